"""Distillation of the whole model at the end: all blocks tuned together to the dense model's output."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from littlebit2.offline.jobs import Job
from littlebit2.train.losses import token_nll
from littlebit2.train.magnitudes import magnitudes, set_magnitudes
from littlebit2.train.model import make_trainable, trainable_layers
from littlebit2_kernels.format import PackedLinear

from .block import BlockRunner, draw, relative_rates, trained_parameters, weight_errors
from .output import output_kl
from .precision import products
from .tune import Saved, Tuned, tune

__all__ = ["SIGNS_FROM", "Distillation", "Distilled", "evaluations"]

#: Steps from which on signs move too: what they cost first is not won back by fewer (docs/quantization.md).
SIGNS_FROM = 32
#: How many times their rate the scales take where they move alone.
_ALONE = 2.0


def evaluations(steps: int) -> int:
    """Return the number of measurements, evenly spread over the steps; the state is saved at each."""
    return 10 if steps >= SIGNS_FROM else 2


@dataclass(frozen=True)
class Distilled:
    """What the distillation came to.

    Attributes:
        layers: by job, packed layers and what changes in their report entries.
        changed: new values of tensors of the checkpoint that stay dense, by name.
        latents: of every block, see :func:`.magnitudes`.
        tuned: KL on the held-out sequences before and after, and steps.
        nll: summed negative log-likelihood of the held-out tokens.
    """

    layers: list[tuple[Job, PackedLinear, dict[str, Any]]]
    changed: dict[str, torch.Tensor]
    latents: list[dict[str, torch.Tensor]]
    tuned: Tuned
    nll: float


class Distillation:
    """Minimizes KL(dense || quantized) of the logits over all packed layers, norms and biases.

    The whole quantized model, its optimizer and the dense blocks are in memory; the weights of these in the
    precision of the products.

    Args:
        runner: of the run.
        jobs: the packed layers of every block.
        layer: returns a packed layer to start from.
        latents: returns what the tuning of a block left of them, see :func:`.magnitudes`.
        changed: tensors of the checkpoint that tuning has changed, by name.
        ids: tokens ``[S, T]`` of the sequences for it, which are seen once before any is seen again.
        held_out: tokens ``[H, T]`` of the sequences on which states are compared.
    """

    def __init__(
        self,
        runner: BlockRunner,
        jobs: Sequence[Sequence[Job]],
        layer: Callable[[Job], PackedLinear],
        latents: Callable[[int], Mapping[str, torch.Tensor]],
        changed: Mapping[str, torch.Tensor],
        ids: torch.Tensor,
        held_out: torch.Tensor,
    ) -> None:
        self.runner = runner
        self.settings = runner.settings
        self.pieces = runner.pieces
        self.jobs = jobs
        self.ids = ids
        self.held_out = held_out
        self.latents: list[nn.Parameter] = []
        self.scales: list[nn.Parameter] = []
        self.stored: dict[nn.Parameter, torch.dtype] = {}
        self.files: dict[nn.Parameter, str] = {}
        self._dense = [self.pieces.load_block(index) for index in range(len(self.pieces))]
        self._held_out_states = self._dense_states()
        if self.settings.precision == "bfloat16":
            self._round_dense()
        self._blocks = [
            self._block(index, layer, latents(index), changed) for index in range(len(self.pieces))
        ]

    def _block(
        self,
        index: int,
        layer: Callable[[Job], PackedLinear],
        values: Mapping[str, torch.Tensor],
        changed: Mapping[str, torch.Tensor],
    ) -> nn.Module:
        runner, members = self.runner, self.jobs[index]
        block = self.pieces.load_block(index)
        if members:
            device = self.pieces.device
            make_trainable(block, {runner.inside(index, job): layer(job).to(device) for job in members})
            set_magnitudes(block, values, f"{self.pieces.name(index)}.")
        latents, scales = trained_parameters(block)
        stored, files = runner.norms(block, index)
        with torch.no_grad():
            for parameter, name in files.items():
                if name in changed:
                    parameter.copy_(changed[name])
        for parameter in (*latents, *scales, *stored):
            parameter.requires_grad_(True)
        self.latents += latents
        self.scales += scales
        self.stored.update(stored)
        self.files.update(files)
        return block

    def _dense_states(self) -> list[torch.Tensor]:
        """Return the held-out hidden states after the last dense block, in batches."""
        return [self._states(self._dense, ids) for ids in self._held_out()]

    def _held_out(self) -> Sequence[torch.Tensor]:
        return self.held_out.split(self.settings.distill_batch_size)

    def _round_dense(self) -> None:
        """Round the weights of the dense blocks to what their products take them as, once."""
        for block in self._dense:
            for module in block.modules():
                if isinstance(module, nn.Linear):
                    module.to(torch.bfloat16)

    def _states(self, blocks: Sequence[nn.Module], ids: torch.Tensor) -> torch.Tensor:
        """Return the hidden states after the last of some blocks."""
        return self.pieces.states(
            ids, lambda index, hidden, call: call(blocks[index], hidden), gradients=torch.is_grad_enabled()
        )

    def free(self, steps: int) -> bool:
        """Let latents have gradients if so many steps move them; return whether they do."""
        signs = steps >= SIGNS_FROM
        for latent in self.latents:
            latent.requires_grad_(signs)
        return signs

    def loss(self, rows: Sequence[int]) -> torch.Tensor:
        """Return the KL of some sequences, with a gradient."""
        ids = self.ids[list(rows)]
        with products(self.settings.precision, self.pieces.device):
            with torch.no_grad():
                target = self._states(self._dense, ids)
            return output_kl(self.pieces, ids, self._states(self._blocks, ids), target)

    def measure(self) -> float:
        """Return the KL of the held-out sequences."""
        total = 0.0
        with torch.no_grad():
            for ids, states in zip(self._held_out(), self._held_out_states, strict=True):
                kl = output_kl(self.pieces, ids, self._states(self._blocks, ids), states)
                total += float(kl) * len(ids)
        return total / len(self.held_out)

    def run(
        self,
        steps: int,
        saved: Saved,
        tell: Callable[[int], object],
        measured: Callable[[int, float], object],
    ) -> Distilled:
        """Take the steps; of fewer than :data:`SIGNS_FROM` the latents keep their values.

        Args:
            steps: of the optimizer.
            saved: where the state is kept, for a run that is killed.
            tell: called with the number of steps that are done.
            measured: called with it and the held-out KL, whenever that is measured.
        """
        settings = self.settings
        signs = self.free(steps)
        scale_lr = settings.distill_scale_lr * (1.0 if signs else _ALONE)
        rows = list(range(len(self.ids)))
        order = draw(rows, settings.distill_batch_size, steps, settings.seed + len(self.pieces))

        def loss(step: int) -> torch.Tensor:
            value = self.loss(order[step])
            tell(step)
            return value

        tuned = tune(
            loss,
            self.measure,
            [
                (self.latents if signs else [], settings.distill_lr),
                *relative_rates([*self.scales, *self.stored], scale_lr),
            ],
            self.stored,
            steps=steps,
            warmup=settings.warmup,
            evaluations=evaluations(steps),
            # Signs that begin to move cost something before they gain: its time is used up.
            patience=evaluations(steps),
            saved=saved,
            tell=measured,
        )
        nll = 0.0
        with torch.no_grad():
            for ids in self._held_out():
                logits = self.pieces.finish(ids, self._states(self._blocks, ids))
                nll += float(token_nll(logits, ids.to(self.pieces.device)))
        values = {name: p.detach().to(self.stored[p]).cpu().contiguous() for p, name in self.files.items()}
        latents = [
            magnitudes(block, f"{self.pieces.name(index)}.") for index, block in enumerate(self._blocks)
        ]
        return Distilled(self._packed(), values, latents, tuned, nll)

    def _packed(self) -> list[tuple[Job, PackedLinear, dict[str, Any]]]:
        found = []
        for index, members in enumerate(self.jobs):
            trained, dense = trainable_layers(self._blocks[index]), self.pieces.load_block(index)
            for job in members:
                inside = self.runner.inside(index, job)
                packed = trained[inside].packed()
                weight: Any = dense.get_submodule(inside).weight
                found.append((job, packed, weight_errors(packed, weight, None)))
        return found
