"""The benchmark of block-by-block quantization: its commands and its texts. Nothing is downloaded."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from benchmarks.quality import smollm
from benchmarks.quality.blockwise import STAGES, add_arguments
from benchmarks.quality.stages import commands as commands_module
from benchmarks.quality.stages import measure as measuring
from benchmarks.quality.stages.commands import (
    calibrate_command,
    finetune_command,
    quantize_command,
    seconds_per_step,
)
from benchmarks.quality.stages.judging import Judgment
from littlebit2.cli import build_parser


def options_of(*arguments: str) -> Namespace:
    parser = ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(["--steps", "7", "--distill-minutes", "9", *arguments])


@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage != "finetune"])
def test_commands_are_those_of_the_command_line(stage: str) -> None:
    given = quantize_command(
        stage, Path("dense"), Path("text"), Path("out"), 0.55, 3, Path("importance"), options_of()
    )
    args = build_parser().parse_args(given)
    assert (args.bpw, args.seed) == (0.55, 3)
    assert (args.data is None) == (stage in ("layers", "importance"))
    assert args.importance == ("importance" if stage == "importance" else None)
    assert args.steps == {"untuned": 0, "tuned": 7, "ranks": 7, "distilled": 7}.get(stage)
    assert args.budget == ("kl" if stage == "ranks" else "uniform")
    assert args.distill_minutes == {"distilled": 9.0}.get(stage)


def test_other_commands_are_those_of_the_command_line() -> None:
    args = build_parser().parse_args(finetune_command(Path("dense"), Path("text"), Path("out"), 0.55, 3, 11))
    assert (args.quant_seed, args.steps) == (3, 11)
    args = build_parser().parse_args(
        calibrate_command(Path("dense"), Path("text"), Path("out"), options_of())
    )
    assert args.tokens == 256 * 256


def test_time_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(arguments: Sequence[str], threads: int) -> tuple[float, int]:
        return 30 + 2.5 * int(arguments[0]), 1

    monkeypatch.setattr(commands_module, "run_command", run)
    assert seconds_per_step(lambda steps: [str(steps)], 1) == (2.5, 30)


def test_stages_are_measured_once_and_build_on_one_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands: list[list[str]] = []

    def run(arguments: Sequence[str], threads: int) -> tuple[float, int]:
        commands.append(list(arguments))
        return 60.0 * len(commands), len(commands)

    monkeypatch.setattr(measuring, "run_command", run)
    monkeypatch.setattr(measuring, "seconds_per_step", lambda command, threads: (6.0, 0.0))
    monkeypatch.setattr(measuring, "dense_checkpoint", lambda folder: folder / "dense")
    monkeypatch.setattr(measuring, "write_texts", lambda folder: {"tune": "1", "evaluate": "2"})
    monkeypatch.setattr(
        measuring,
        "judge",
        lambda *arguments: Judgment(10.0 + len(commands), 0.5, 0.9, {"Why?": "So."}),
    )
    options = options_of("--bpw", "1", "--seeds", "0", "--out", str(tmp_path), "--stages", "finetune")
    options.threads = torch.get_num_threads()
    options.command, options.arguments = "blockwise", []
    measuring.measure(options)
    assert [command[0] for command in commands] == ["quantize", "quantize", "finetune"]
    tuned, distilled, finetune = commands
    assert "--distill-minutes" not in tuned
    assert tuned[2] == distilled[2]  # the same output, whose work folder is kept
    assert finetune[finetune.index("--steps") + 1] == str(3 * 60 // 6)  # one and two minutes
    measuring.measure(options)
    assert len(commands) == 3
    printed = capsys.readouterr().out
    assert "| 1   | 0    | distilled |" in printed
    assert "> Why?\nSo." in printed


def test_texts_are_disjoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = {f"document {number}" for number in range(200)}

    def given(packages: Path) -> Iterator[str]:
        yield from documents

    monkeypatch.setattr(smollm, "_packages", lambda folder: folder)
    monkeypatch.setattr(smollm, "_documents", given)
    hashes = smollm.write_texts(tmp_path)
    parts = {name: {file.read_text() for file in (tmp_path / "text" / name).iterdir()} for name in hashes}
    assert parts["tune"] | parts["evaluate"] == documents
    assert not parts["tune"] & parts["evaluate"]
    assert 0 < len(parts["evaluate"]) < 40
    assert smollm.write_texts(tmp_path) == hashes
