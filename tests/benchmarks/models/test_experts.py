"""``python -m benchmarks experts`` at a tiny size; nothing here looks at a measured time."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.__main__ import main
from benchmarks.models.experts import routing
from benchmarks.records import read_result


@pytest.mark.parametrize(
    ("tokens", "per_token", "routed"), [(1, 1, 1), (1, 8, 8), (16, 8, 16), (16, 8, 128), (5, 3, 15)]
)
def test_a_routing_names_as_many_experts_as_it_says(tokens: int, per_token: int, routed: int) -> None:
    index = routing(tokens, per_token, routed, 128)
    assert index.shape == (tokens, per_token)
    assert len(index.unique()) == routed
    assert all(len(row.unique()) == per_token for row in index)
    assert index.max() < 128


def test_every_possible_routing_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "experts.json"
    sizes = ["--experts", "4", "--hidden", "64", "--inner", "48", "--top-k", "2", "--bpw", "2"]
    quick = ["--tokens", "1", "3", "--routed", "1", "2", "4", "8", "--repetitions", "1", "--seconds", "1e-6"]
    assert main(["experts", *sizes, *quick, "--copies", "1", "--cpu-time", "--json", str(file)]) == 0
    rows = read_result(file, ["experts"])["rows"]
    assert [(row["tokens"], row["routed"]) for row in rows] == [(1, 1), (1, 2), (3, 1), (3, 2), (3, 4)]
    assert all(row["packed"] and row["dense"] for row in rows)
    assert "us per routed expert" in capsys.readouterr().out
