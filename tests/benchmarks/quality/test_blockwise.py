"""The benchmark of block-by-block quantization: its commands and its texts. Nothing is downloaded."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.quality import smollm
from benchmarks.quality.blockwise import STAGES, add_arguments
from benchmarks.quality.blockwise_stages import command
from littlebit2.cli import build_parser


@pytest.mark.parametrize("stage", STAGES)
def test_commands_are_those_of_the_command_line(stage: str) -> None:
    parser = ArgumentParser()
    add_arguments(parser)
    options = parser.parse_args(["--steps", "7", "--distill-steps", "9"])
    given = command(stage, Path("dense"), Path("text"), Path("out"), 0.55, 3, options)
    args = build_parser().parse_args(given)
    assert args.bpw == 0.55
    if stage == "finetune":
        assert args.quant_seed == 3
    else:
        assert args.seed == 3
        assert (args.data is None) == (stage == "layers")
        assert args.steps == {"layers": None, "untuned": 0, "tuned": 7, "distilled": 7}[stage]
        assert args.distill_steps == {"layers": None, "distilled": 9}.get(stage, 0)


def test_texts_are_disjoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = {f"document {number}" for number in range(200)}

    def given() -> Iterator[str]:
        yield from documents

    monkeypatch.setattr(smollm, "_documents", given)
    hashes = smollm.write_texts(tmp_path)
    parts = {name: {file.read_text() for file in (tmp_path / name).iterdir()} for name in hashes}
    assert parts["tune"] | parts["evaluate"] == documents
    assert not parts["tune"] & parts["evaluate"]
    assert 0 < len(parts["evaluate"]) < 40
    assert smollm.write_texts(tmp_path) == hashes
