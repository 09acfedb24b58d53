"""Distillation of the whole model at the end: all blocks tuned together to the dense model's output.

The hidden states of the dense model after its last block are on disk by then: the teacher is no more than the
model's head on them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from littlebit2.offline.jobs import Job
from littlebit2.train.losses import distillation_kl, token_nll
from littlebit2.train.model import make_trainable, trainable_layers
from littlebit2_kernels.format import PackedLinear

from .block import BlockRunner, batches, draw, relative_rates, trained_parameters, weight_errors
from .pieces import BlockCall
from .states import States
from .tune import Tuned, tune

__all__ = ["Distilled", "distill"]


@dataclass(frozen=True)
class Distilled:
    """What the distillation came to.

    Attributes:
        layers: by job, packed layers and what changes in their report entries.
        changed: new values of tensors of the checkpoint that stay dense, by name.
        tuned: KL on the held-out sequences before and after, and steps.
        nll: summed negative log-likelihood of the held-out tokens.
    """

    layers: list[tuple[Job, PackedLinear, dict[str, Any]]]
    changed: dict[str, torch.Tensor]
    tuned: Tuned
    nll: float


class _Student:
    """All blocks in training at once; the model's own forward runs them."""

    def __init__(
        self,
        runner: BlockRunner,
        jobs: Sequence[Sequence[Job]],
        layer: Callable[[Job], PackedLinear],
        changed: Mapping[str, torch.Tensor],
    ) -> None:
        self.runner = runner
        self.jobs = jobs
        self.blocks: list[nn.Module] = []
        self.latents: list[nn.Parameter] = []
        self.scales: list[nn.Parameter] = []
        self.stored: dict[nn.Parameter, torch.dtype] = {}
        self.files: dict[nn.Parameter, str] = {}
        for index, members in enumerate(jobs):
            block = runner.pieces.load_block(index)
            if members:
                device = runner.pieces.device
                make_trainable(block, {runner.inside(index, job): layer(job).to(device) for job in members})
            latents, scales = trained_parameters(block)
            stored, files = runner.norms(block, index)
            with torch.no_grad():
                for parameter, name in files.items():
                    if name in changed:
                        parameter.copy_(changed[name])
            for parameter in (*latents, *scales, *stored):
                parameter.requires_grad_(True)
            self.blocks.append(block)
            self.latents += latents
            self.scales += scales
            self.stored.update(stored)
            self.files.update(files)

    def logits(self, rows: Sequence[int]) -> torch.Tensor:
        """Return the logits ``[B, T, vocabulary]`` of some sequences."""

        def visit(index: int, hidden: torch.Tensor, call: BlockCall) -> torch.Tensor:
            return call(self.blocks[index], hidden)

        pieces = self.runner.pieces
        with pieces.visited(visit):
            return pieces.run(self.runner.ids[list(rows)], gradients=torch.is_grad_enabled())

    def layers(self) -> list[tuple[Job, PackedLinear, dict[str, Any]]]:
        """Return the packed layers."""
        found = []
        for index, members in enumerate(self.jobs):
            dense = self.runner.pieces.load_block(index)
            trained = trainable_layers(self.blocks[index])
            for job in members:
                inside = self.runner.inside(index, job)
                packed = trained[inside].packed()
                weight: Any = dense.get_submodule(inside).weight
                found.append((job, packed, weight_errors(packed, weight, None)))
        return found


def distill(
    runner: BlockRunner,
    jobs: Sequence[Sequence[Job]],
    layer: Callable[[Job], PackedLinear],
    changed: Mapping[str, torch.Tensor],
    teacher: States,
    tell: Callable[[int], object],
) -> Distilled:
    """Minimize KL(dense || quantized) of the logits over all packed layers, norms and biases.

    The whole quantized model and its optimizer are in memory.

    Args:
        runner: of the run.
        jobs: the packed layers of every block.
        layer: returns a packed layer to start from.
        changed: tensors of the checkpoint that tuning has changed, by name.
        teacher: hidden states after the last block of the dense model.
        tell: called with the number of each step that is done.
    """
    settings = runner.settings
    student = _Student(runner, jobs, layer, changed)
    pieces = runner.pieces
    size = settings.distill_batch_size
    order = draw(runner.samples, size, settings.distill_steps, settings.seed + len(pieces))

    def target(rows: Sequence[int]) -> torch.Tensor:
        return pieces.finish(runner.ids[list(rows)], teacher.read(rows).to(pieces.device))

    def loss(step: int) -> torch.Tensor:
        rows = order[step]
        value = distillation_kl(student.logits(rows), target(rows))
        tell(step)
        return value

    def measure() -> float:
        total = 0.0
        with torch.no_grad():
            for rows in batches(runner.held_out, size):
                total += float(distillation_kl(student.logits(rows), target(rows))) * len(rows)
        return total / len(runner.held_out)

    tuned = tune(
        loss,
        measure,
        [
            (student.latents, settings.distill_lr),
            *relative_rates([*student.scales, *student.stored], settings.distill_scale_lr),
        ],
        student.stored,
        steps=settings.distill_steps,
        warmup=settings.warmup,
        evaluations=settings.evaluations,
        patience=settings.patience,
    )
    nll = 0.0
    with torch.no_grad():
        for rows in batches(runner.held_out, size):
            nll += float(token_nll(student.logits(rows), runner.ids[rows].to(pieces.device)))
    values = {name: p.detach().to(student.stored[p]).cpu().contiguous() for p, name in student.files.items()}
    return Distilled(student.layers(), values, tuned, nll)
