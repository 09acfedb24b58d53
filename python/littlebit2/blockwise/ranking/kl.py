"""What the model's output loses when one group of layers alone is quantized, at a given rank.

One block at a time is in memory. The hidden states of a trial begin in the block of its group and go on
through the dense blocks after it. Those of all trials lie in one file, over which every block passes once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from littlebit2.blockwise.states import States
from littlebit2.blockwise.tuning.block import BlockRunner, batches
from littlebit2.quantize import Importance, collect_importance
from littlebit2.train.losses import distillation_kl
from littlebit2_kernels.reference import dense_weight

from .allocation import LayerGroup, with_rank

__all__ = ["Trial", "measure_kl"]

#: Of ADMM and of refinement: what is tried only compares the groups.
_ITERATIONS, _ROUNDS = 6, 1
#: Of as many tokens of a sequence, one whose predictions are compared: the head is dear.
_EVERY = 3


@dataclass(frozen=True)
class Trial:
    """A group of layers quantized alone.

    Attributes:
        group: of layers.
        rank: of each of their paths.
    """

    group: LayerGroup
    rank: int


def measure_kl(
    runner: BlockRunner, trials: Sequence[Trial], scratch: Path, done: Callable[[], object]
) -> list[float]:
    """Return KL(dense || quantized) of the predictions of every trial, in nats per token.

    What follows the last block is taken to see each token alone, as norms and heads do.

    Args:
        runner: whose sequences, but the held-out ones, are used.
        trials: of groups in any blocks.
        scratch: a file for hidden states, which is removed again.
        done: called after each block, and after the logits.
    """
    return _Measurement(runner, trials, scratch).run(done)


class _Measurement:
    def __init__(self, runner: BlockRunner, trials: Sequence[Trial], scratch: Path) -> None:
        self.runner = runner
        self.pieces = runner.pieces
        self.trials = trials
        self.count = len(runner.samples)
        self.parts = list(batches(runner.samples, runner.settings.batch_size))
        #: Of the dense model, before the block that is next, by part.
        self.hidden = [self.pieces.embed(runner.ids[part]) for part in self.parts]
        _, length, width = self.hidden[0].shape
        self.states = States(scratch, (len(trials) * self.count, length, width), create=True)

    def run(self, done: Callable[[], object]) -> list[float]:
        try:
            with torch.no_grad():
                for index in range(len(self.pieces)):
                    self._block(index)
                    done()
                found = self._logits()
                done()
                return found
        finally:
            self.states.discard()

    def _apply(self, block: nn.Module, index: int, part: Sequence[int], hidden: torch.Tensor) -> torch.Tensor:
        return self.runner.call(index, part)(block, hidden)

    def _at(self, number: int, part: Sequence[int]) -> list[int]:
        """Where the states of a trial lie, for some sequences."""
        return [number * self.count + row for row in part]

    def _read(self, number: int, part: Sequence[int]) -> torch.Tensor:
        return self.states.read(self._at(number, part)).to(self.pieces.device)

    def _block(self, index: int) -> None:
        block = self.pieces.load_block(index)
        for number, trial in enumerate(self.trials):
            if trial.group.block < index:
                self._advance(block, index, number, [self._read(number, part) for part in self.parts])
        importance = collect_importance(
            block,
            zip(self.parts, self.hidden, strict=True),
            run=lambda module, batch: self._apply(module, index, *batch),
        )
        for number, trial in enumerate(self.trials):
            if trial.group.block == index:
                with self._quantized(block, trial, importance):
                    self._advance(block, index, number, self.hidden)
        self.hidden = [
            self._apply(block, index, part, hidden)
            for part, hidden in zip(self.parts, self.hidden, strict=True)
        ]

    def _advance(self, block: nn.Module, index: int, number: int, hidden: Sequence[torch.Tensor]) -> None:
        """Write what a block makes of a trial's hidden states, given by part."""
        for part, state in zip(self.parts, hidden, strict=True):
            self.states.write(self._at(number, part), self._apply(block, index, part, state))

    @contextmanager
    def _quantized(
        self, block: nn.Module, trial: Trial, importance: Mapping[str, Importance]
    ) -> Iterator[None]:
        """Give the layers of a trial their quantized weights, and take them away again."""
        jobs = [
            replace(
                job,
                config=replace(
                    job.config,
                    admm_iterations=min(job.config.admm_iterations, _ITERATIONS),
                    refine_rounds=min(job.config.refine_rounds, _ROUNDS),
                ),
            )
            for job in (with_rank(one, trial.rank) for one in trial.group.jobs)
        ]
        packed, _ = self.runner.quantize(block, trial.group.block, jobs, importance)
        modules: dict[str, Any] = {name: block.get_submodule(name) for name in packed}
        weights = {name: module.weight for name, module in modules.items()}
        for name, module in modules.items():
            module.weight = nn.Parameter(dense_weight(packed[name], torch.float32), requires_grad=False)
        try:
            yield
        finally:
            for name, module in modules.items():
                module.weight = weights[name]

    def _logits(self) -> list[float]:
        found = [0.0] * len(self.trials)
        dense = torch.cat(self.hidden)
        picked = torch.arange(dense.shape[1] - 1, -1, -_EVERY).flip(0)
        for row in self.runner.samples:
            ids = self.runner.ids[[row]][:, picked]
            target = self.pieces.finish(ids, dense[[row]][:, picked])
            for number in range(len(self.trials)):
                logits = self.pieces.finish(ids, self._read(number, [row])[:, picked])
                found[number] += float(distillation_kl(logits, target))
        return [total / self.count for total in found]
