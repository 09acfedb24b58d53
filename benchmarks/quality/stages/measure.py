"""The stages of `blockwise`: what runs in which order, and the table of what came out."""

from __future__ import annotations

import json
import shutil
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from benchmarks.markdown import markdown
from benchmarks.options import note
from benchmarks.quality.smollm import dense_checkpoint, write_texts
from benchmarks.quality.stages.commands import (
    calibrate_command,
    finetune_command,
    quantize_command,
    run_command,
    seconds_per_step,
)
from benchmarks.quality.stages.judging import Judgment, judge
from benchmarks.records import environment, write_result

__all__ = ["Stage", "measure"]


@dataclass(frozen=True)
class Stage:
    """One measured checkpoint.

    Attributes:
        stage: of :data:`.STAGES`, or ``"dense"``.
        bpw: bits per weight asked for; 16 for the dense model.
        seed: of quantization and tuning.
        judgment: on the evaluation text.
        minutes: of all commands that led to it, by the clock.
        peak: largest resident memory of these commands, bytes.
        commands: arguments of ``littlebit2``.
    """

    stage: str
    bpw: float
    seed: int
    judgment: Judgment
    minutes: float = 0.0
    peak: int = 0
    commands: list[list[str]] = field(default_factory=list)


def measure(options: Namespace) -> None:
    """Run what is not measured yet: the table goes to stdout, JSON to ``options.out``."""
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    dense = dense_checkpoint(options.out)
    hashes = write_texts(options.out)
    note(f"text: {', '.join(f'{name} sha256 {digest}' for name, digest in hashes.items())}")
    stages = _Stages(options, dense)
    for bpw in options.bpw:
        for seed in options.seeds:
            for stage in options.stages:
                stages.get(stage, bpw, seed)
    about = environment(torch.device("cpu"), [options.threads])
    print(_table(stages.found))
    for one in stages.found:
        for prompt, answer in one.judgment.answers.items():
            print(f"\n{one.stage}, {one.bpw:g} bpw, seed {one.seed}\n> {prompt}\n{answer}")
    path = write_result(options.out / "blockwise.json", options, about, texts=hashes, stages=stages.found)
    note(f"wrote {path}")


class _Stages:
    """Measures stages, each once; what was measured is in a file of ``out``."""

    def __init__(self, options: Namespace, dense: Path) -> None:
        self.options = options
        self.dense = dense
        self.tune = options.out / "text" / "tune"
        self.evaluate = options.out / "text" / "evaluate"
        self._path = options.out / "stages.json"
        self.found: list[Stage] = []
        if self._path.is_file():
            self.found = [
                Stage(**{**one, "judgment": Judgment(**one["judgment"])})
                for one in json.loads(self._path.read_text("utf-8"))
            ]
        self._keep_dense()

    def _keep_dense(self) -> None:
        if not self.found:
            self._keep(Stage("dense", 16.0, 0, self._judge(self.dense)))

    def _judge(self, checkpoint: Path) -> Judgment:
        return judge(checkpoint, self.dense, self.evaluate, self.options.tokens)

    def _keep(self, stage: Stage) -> Stage:
        self.found.append(stage)
        self._path.write_text(json.dumps([asdict(one) for one in self.found], indent=1), "utf-8")
        one = stage.judgment
        note(f"{stage.stage}: perplexity {one.perplexity:.4g}, KL {one.kl:.3g}, {stage.minutes:.1f} minutes")
        return stage

    def get(self, stage: str, bpw: float, seed: int) -> Stage:
        """Return a stage, measured now if it was not yet."""
        for one in self.found:
            if (one.stage, one.bpw, one.seed) == (stage, bpw, seed):
                return one
        return self._keep(
            self._finetune(bpw, seed) if stage == "finetune" else self._quantize(stage, bpw, seed)
        )

    def _quantize(self, stage: str, bpw: float, seed: int) -> Stage:
        # The distillation goes on from the blocks that the tuning left.
        before = self.get("tuned", bpw, seed) if stage == "distilled" else None
        kind = "blocks" if stage in ("tuned", "distilled") else stage
        out = self.options.out / f"{kind}-{bpw:g}-{seed}"
        commands = []
        importance = self.options.out / "importance.safetensors"
        if stage == "importance":
            commands.append(calibrate_command(self.dense, self.tune, importance, self.options))
        commands.append(
            quantize_command(stage, self.dense, self.tune, out, bpw, seed, importance, self.options)
        )
        runs = [run_command(arguments, self.options.threads) for arguments in commands]
        if stage == "distilled":
            shutil.rmtree(out.with_name(f"{out.name}.partial"), ignore_errors=True)
        return Stage(
            stage,
            bpw,
            seed,
            self._judge(out),
            sum(seconds for seconds, _ in runs) / 60 + (before.minutes if before else 0.0),
            max([peak for _, peak in runs] + ([before.peak] if before else [])),
            commands,
        )

    def _finetune(self, bpw: float, seed: int) -> Stage:
        """Training alone, for as long as blocks and distillation took."""
        minutes = self.get("distilled", bpw, seed).minutes
        out = self.options.out / f"finetune-{bpw:g}-{seed}"

        def command(steps: int) -> list[str]:
            shutil.rmtree(out.with_name(f"{out.name}.finetune"), ignore_errors=True)
            return finetune_command(self.dense, self.tune, out, bpw, seed, steps)

        each, fixed = seconds_per_step(command, self.options.threads)
        arguments = command(max(int((60 * minutes - fixed) / each), 1))
        seconds, peak = run_command(arguments, self.options.threads)
        return Stage("finetune", bpw, seed, self._judge(out), seconds / 60, peak, [arguments])


def _table(stages: Sequence[Stage]) -> str:
    dense = stages[0].judgment.perplexity
    lines = [
        [
            f"{one.bpw:g}",
            str(one.seed),
            one.stage,
            f"{one.judgment.perplexity:.4g}",
            f"{one.judgment.perplexity / dense:.3g}",
            f"{one.judgment.kl:.3g}",
            f"{one.judgment.top1:.1%}",
            f"{one.minutes:.1f}",
            f"{one.peak / 1e9:.2f}",
        ]
        for one in stages
    ]
    head = ("bpw", "seed", "stage", "perplexity", "times dense", "KL", "top-1", "minutes", "peak GB")
    return markdown(head, lines)
