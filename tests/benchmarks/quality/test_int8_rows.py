"""What int8 rows do to a model, on a tiny one in place of the real one."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from benchmarks.__main__ import main
from benchmarks.quality import smollm
from tests.train.builders import write_teacher, write_text


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    dense = write_teacher(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(dense)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(dense)
    (tmp_path / "text" / "evaluate").mkdir(parents=True)
    write_text(tmp_path / "text" / "evaluate" / "text.txt", 4000)
    monkeypatch.setattr(smollm, "dense_checkpoint", lambda folder: dense)
    monkeypatch.setattr(smollm, "write_texts", lambda folder: {"evaluate": "hash"})
    out = tmp_path / "found.json"
    arguments = ["--block", "16", "--tokens", "256", "--out", str(tmp_path), "--json", str(out)]
    assert main(["int8-rows", *arguments]) == 0
    assert re.search(r"\| int8 .* \| [\d.e+-]+ +\| [\d.]+% +\|", capsys.readouterr().out)
    found = json.loads(out.read_text("utf-8"))["found"]
    assert found["tokens"] == 256 // 16 * 15
    assert found["int8"] == pytest.approx(found["dense"], rel=0.02)
    assert 0 < found["kl"] < 0.01
    assert found["top1"] > 0.9
    rows, columns = model.get_input_embeddings().weight.shape
    assert found["dense_bytes"] == 2 * rows * columns
    assert found["int8_bytes"] == rows * columns + 4 * rows
