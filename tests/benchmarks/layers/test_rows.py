"""Documents of sweep and goals: round trips, refusals, CSV, tables and figures."""

from __future__ import annotations

import csv
import dataclasses
import json
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from benchmarks.layers.rows import (
    Check,
    Document,
    Floor,
    load_document,
    rows_table,
    write_csv,
    write_document,
)
from benchmarks.plots import document_figures, series
from benchmarks.records import SCHEMA, environment
from tests.benchmarks.builders import row

OPTIONS = Namespace(command="sweep", arguments=["sweep"], run=print)
HEAD = {"schema": SCHEMA, "benchmark": "sweep", "command": "", "environment": {}, "settings": {}}


@pytest.fixture
def document() -> Document:
    peer = row(candidate="dense", ours=False, samples=[0.01, 0.02, 0.03], macs=45_000_000)
    ours = row(
        speedups={"dense float32": [10.0, 9.0, 11.0]}, floor_fraction=0.25, error=1e-7, error_bound=2e-6
    )
    return Document(
        environment=environment(torch.device("cpu"), [1]),
        floors=[Floor(1, 30.0, 25.0, {"float32": 100.0})],
        rows=[ours, peer, dataclasses.replace(ours, tokens=8, mode="hot", threads=2)],
        checks=[Check("littlebit2:cpu:int16", "bfloat16", "llama2-7b-up", 0.1, "outliers", 1e-3, 2e-3)],
        unavailable={"gemlite float32": "no"},
        goals=[{"text": "fast", "met": False}],
    )


def test_json_round_trip(document: Document, tmp_path: Path) -> None:
    path = write_document(tmp_path / "deep" / "rows.json", OPTIONS, document)
    assert load_document(path) == document
    assert [p.name for p in path.parent.iterdir()] == ["rows.json"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({}, "does not hold what a result of sweep or goals has: 'floors'"),
        ({"floors": [], "rows": [{"group": "g"}], "checks": []}, "does not hold what .* missing"),
    ],
)
def test_unreadable_documents_are_refused(more: dict[str, object], message: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({**HEAD, **more}), "utf-8")
    with pytest.raises(ValueError, match=message):
        load_document(path)


def test_csv(document: Document, tmp_path: Path) -> None:
    path = write_csv(tmp_path / "rows.csv", document)
    with path.open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 3
    assert lines[0]["median vs dense float32"] == "10.0"
    assert lines[1]["median vs dense float32"] == ""
    assert float(lines[0]["gmacs"]) == pytest.approx(4.0)
    assert float(lines[0]["gbs"]) == pytest.approx(0.5)
    assert lines[0]["ranks"] == "136+136"
    assert lines[0]["device"] == document.environment["device"]
    assert "samples" not in lines[0]
    assert not list(tmp_path.glob("*.part"))


def test_table(document: Document) -> None:
    lines = rows_table(document.rows).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert "10x (9-11)" in lines[2]
    assert "25%" in lines[2]
    assert "1.0e-07" in lines[2]
    past = dataclasses.replace(document.rows[0], error=1.0)
    assert "> bound" in rows_table([past])


def test_series_average_over_shapes() -> None:
    rows = [row(shape=shape, bpw=bpw, tokens=1) for shape in ("a", "b") for bpw in (1.0, 0.1)]
    values = iter((2.0, 3.0, 8.0, 12.0))
    points = series(rows, lambda r: r.bpw, lambda r: next(values))
    assert points == {
        ("littlebit2:cpu:exact float32", "cold", 1): [(0.1, pytest.approx(6.0)), (1.0, pytest.approx(4.0))]
    }


def test_plots(document: Document, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    paths = document_figures(document, tmp_path / "plots")
    assert [path.name for path in paths] == ["roofline.png", "speedup.png", "latency.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    with pytest.raises(ValueError, match="document must have rows to plot, it has none"):
        document_figures(Document({}), tmp_path)


def test_plots_without_matplotlib(
    document: Document, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(RuntimeError, match="plots need matplotlib, which is not installed"):
        document_figures(document, tmp_path)
