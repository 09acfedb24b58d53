"""The demo, on a tiny model: what it prints is what it measured. Nothing is downloaded."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.__main__ import main
from benchmarks.quality.demonstration import show
from benchmarks.quality.demonstration.rounding import ROUNDINGS, round_
from tests.blockwise.builders import write_data, write_model


def test_the_whole_demo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def texts(folder: Path) -> dict[str, str]:
        for name in ("tune", "evaluate"):
            (folder / "text" / name).mkdir(parents=True)
            write_data(folder / "text" / name / "text.txt")
        return {}

    monkeypatch.setattr(show, "dense_checkpoint", lambda folder: write_model(folder / "dense"))
    monkeypatch.setattr(show, "write_texts", texts)
    monkeypatch.setattr(show, "_TOKENS", 256)
    monkeypatch.setattr(show, "_LENGTH", 32)
    monkeypatch.setattr(show, "_ANSWER", 4)
    threads = torch.get_num_threads()
    show.demonstrate(1.0, 0.05, threads, tmp_path)
    printed = capsys.readouterr().out
    lines = {line.split("  ")[0]: line.split() for line in printed.splitlines()}
    dense, packed = (
        lines["16 bits"],
        next(lines[name] for name in lines if re.fullmatch(r"\d\.\d+ bits", name)),
    )
    assert dense[4] == "1.00"
    assert float(packed[5]) < float(dense[5])  # MB
    assert float(packed[6]) > 0  # tokens/s
    assert {"int8, a scale a row", "int4, a scale for 32"} <= set(lines)
    for prompt in show.PROMPTS:
        assert f"> {prompt}\n  16 bits: " in printed
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert f"littlebit2 quantize {tmp_path / 'dense'} {tmp_path / 'better'} --bpw 1 " in printed


@pytest.mark.parametrize("value", ["9", "0.1", "nan", "x"])
def test_wrong_sizes_are_refused_before_any_work(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["demo", "--bpw", value])
    assert "--bpw" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("bits", ROUNDINGS)
def test_rounding(bits: float) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(96, 40)
    layer.weight.data[3] = 0
    model, before = nn.Sequential(layer), layer.weight.detach().clone()
    round_(model, ["0"], ROUNDINGS[bits][1])
    groups = layer.weight.detach().reshape(-1, 96 if bits == 8.0 else 32)
    assert all(len(row.unique()) <= 2 ** int(bits) for row in groups)
    step = before.abs().max() / (127 if bits == 8.0 else 7)
    assert 0 < (layer.weight - before).abs().max() <= 0.5001 * step
    assert not layer.weight[3].any()
