"""One block: importance of its inputs, packed layers, tuning, and the hidden states that it hands on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from littlebit2.architecture.expansion import expand
from littlebit2.architecture.parts import Whole
from littlebit2.offline.jobs import Job
from littlebit2.offline.report import layer_entry
from littlebit2.quantize import Importance, collect_importance
from littlebit2.quantize.quantizer import DenseLayer, quantize_together
from littlebit2.train.magnitudes import magnitudes
from littlebit2.train.model import make_trainable, parameter_kind, trainable_layers
from littlebit2_kernels.format import PackedLinear
from littlebit2_kernels.reference import dense_weight

from ..pieces import BlockCall, ModelInPieces
from ..settings import BlockwiseSettings
from ..states import States
from .precision import products
from .tune import Tuned, relative_error, tune

__all__ = [
    "BlockResult",
    "BlockRunner",
    "batches",
    "draw",
    "relative_rates",
    "trained_parameters",
    "weight_errors",
]

#: Root mean square below which the rate of a parameter does not fall: one of zeros must be able to move.
_LEAST_SIZE = 1e-3


@dataclass(frozen=True)
class BlockResult:
    """What became of a block.

    Attributes:
        layers: packed layers and their report entries, by job.
        changed: new values of tensors of the checkpoint that stay dense, by name.
        latents: how far they are from flipping, see :func:`.magnitudes`.
        tuned: errors and steps.
        seconds: by part of the work.
    """

    layers: list[tuple[Job, PackedLinear, dict[str, Any]]]
    changed: dict[str, torch.Tensor]
    latents: dict[str, torch.Tensor]
    tuned: Tuned
    seconds: dict[str, float] = field(default_factory=dict)


def batches(rows: Sequence[int], size: int) -> Iterator[list[int]]:
    """Yield ``rows`` in order, ``size`` at a time."""
    for start in range(0, len(rows), size):
        yield list(rows[start : start + size])


class BlockRunner:
    """Works on the blocks of a model, one after the other.

    Args:
        pieces: the model.
        settings: of the run.
        ids: tokens ``[S, T]`` of all sequences, those for tuning first, then the held-out ones.
        fixed: whether the other arguments of blocks do not depend on the tokens.
        dtypes: dtype of every tensor of the checkpoint by name.
    """

    def __init__(
        self,
        pieces: ModelInPieces,
        settings: BlockwiseSettings,
        ids: torch.Tensor,
        *,
        fixed: bool,
        dtypes: Mapping[str, torch.dtype],
    ) -> None:
        self.pieces = pieces
        self.settings = settings
        self.ids = ids
        self.fixed = fixed
        self.dtypes = dtypes
        self.held_out = list(range(len(ids) - settings.held_out, len(ids)))
        self.samples = list(range(len(ids) - settings.held_out))
        self._calls: dict[tuple[int, int], BlockCall] = {}

    def call(self, index: int, rows: Sequence[int]) -> BlockCall:
        """Return the other arguments of a block for some sequences."""
        if not self.fixed:
            return self.pieces.call(self.ids[list(rows)], index)
        key = index, len(rows)
        if key not in self._calls:
            self._calls = {known: call for known, call in self._calls.items() if known[0] == index}
            self._calls[key] = self.pieces.call(self.ids[list(rows)], index)
        return self._calls[key]

    def embed(self, to: States) -> None:
        """Write the hidden states that the first block gets."""
        for rows in batches(range(len(self.ids)), self.settings.batch_size):
            to.write(rows, self.pieces.embed(self.ids[rows]))
        to.finish()

    def forward(self, block: nn.Module, index: int, source: States, to: States) -> None:
        """Run a block on all sequences."""
        with torch.no_grad():
            for rows in batches(range(len(self.ids)), self.settings.batch_size):
                to.write(rows, self._apply(block, index, source, rows))
        to.finish()

    def _apply(self, block: nn.Module, index: int, source: States, rows: Sequence[int]) -> torch.Tensor:
        return self.call(index, rows)(block, source.read(rows).to(self.pieces.device))

    def run(
        self,
        index: int,
        jobs: Sequence[Job],
        dense: States,
        quantized: States,
        *,
        next_dense: States,
        next_quantized: States,
        weights: torch.Tensor | None = None,
    ) -> BlockResult:
        """Quantize and tune one block.

        Args:
            index: of the block.
            jobs: its layers to pack.
            dense: hidden states that it gets in the dense model.
            quantized: hidden states that it gets from the quantized blocks before it.
            next_dense: takes its outputs in the dense model, the targets of the tuning.
            next_quantized: takes its outputs in the quantized model.
            weights: of the channels of its output in the loss, see :func:`.relative_error`.
        """
        seconds: dict[str, float] = {}
        clock = _Clock(seconds)
        block = self.pieces.load_block(index)
        self.forward(block, index, dense, next_dense)
        clock.lap("targets")
        importance = self._importance(block, index, quantized)
        clock.lap("importance")
        packed, reports = self.quantize(block, index, jobs, importance)
        clock.lap("quantization")
        matrices = {job.index: _linear(block, self.inside(index, job)).weight.detach() for job in jobs}
        make_trainable(block, packed)
        tuned, changed = self._tune(block, index, quantized, next_dense, weights)
        clock.lap("tuning")
        self.forward(block, index, quantized, next_quantized)
        clock.lap("outputs")
        layers = []
        trained = trainable_layers(block)
        for job, entry in zip(jobs, reports, strict=True):
            inside = self.inside(index, job)
            layer = trained[inside].packed()
            errors = weight_errors(layer, matrices[job.index], importance.get(inside))
            layers.append((job, layer, {**entry, **errors}))
        return BlockResult(layers, changed, magnitudes(block, f"{self.pieces.name(index)}."), tuned, seconds)

    def inside(self, index: int, job: Job) -> str:
        """Name of a layer in its block."""
        return job.source.module.removeprefix(f"{self.pieces.name(index)}.")

    def _importance(self, block: nn.Module, index: int, source: States) -> dict[str, Importance]:
        rows = self.samples[: self.settings.importance_samples]
        with torch.no_grad():
            return collect_importance(
                block,
                batches(rows, self.settings.batch_size),
                run=lambda module, batch: self._apply(module, index, source, batch),
            )

    def quantize(
        self, block: nn.Module, index: int, jobs: Sequence[Job], importance: Mapping[str, Importance]
    ) -> tuple[dict[str, PackedLinear], list[dict[str, Any]]]:
        """Return the packed layers of a block by their names in it, and their report entries."""
        packed, reports = {}, []
        expand(block)  # measuring importance undoes it for weights held transposed
        for job in jobs:
            inside = self.inside(index, job)
            linear = _linear(block, inside)
            layer = DenseLayer(
                _copier(linear.weight), job.config, linear.bias, importance.get(inside), job.source.name
            )
            (made,) = quantize_together([layer])
            packed[inside] = made.packed
            reports.append(layer_entry(made.report, bias=linear.bias is not None))
        return packed, reports

    def _tune(
        self,
        block: nn.Module,
        index: int,
        inputs: States,
        targets: States,
        weights: torch.Tensor | None,
    ) -> tuple[Tuned, dict[str, torch.Tensor]]:
        settings = self.settings
        latents, scales = trained_parameters(block)
        stored, files = self.norms(block, index)
        for parameter in (*latents, *scales, *stored):
            parameter.requires_grad_(True)
        order = draw(self.samples, settings.batch_size, settings.steps, settings.seed + index)

        def error(rows: Sequence[int]) -> torch.Tensor:
            target = targets.read(rows).to(self.pieces.device)
            return relative_error(self._apply(block, index, inputs, rows), target, weights)

        def loss(step: int) -> torch.Tensor:
            with products(settings.precision, self.pieces.device):
                return error(order[step])

        def measure() -> float:
            total = 0.0
            with torch.no_grad():
                for rows in batches(self.held_out, settings.batch_size):
                    total += float(error(rows)) * len(rows)
            return total / len(self.held_out)

        tuned = tune(
            loss,
            measure,
            [(latents, settings.lr), *relative_rates([*scales, *stored], settings.scale_lr)],
            stored,
            steps=settings.steps,
            warmup=settings.warmup,
            evaluations=settings.evaluations,
            patience=settings.patience,
        )
        block.requires_grad_(False)
        changed = {name: p.detach().to(stored[p]).cpu().contiguous() for p, name in files.items()}
        return tuned, changed

    def norms(
        self, block: nn.Module, index: int
    ) -> tuple[dict[nn.Parameter, torch.dtype], dict[nn.Parameter, str]]:
        """Return the vectors outside the packed layers with their dtypes and names in the checkpoint.

        Those that do not lie in a file as they are stay as they are.
        """
        stored, files = {}, {}
        own = {id(p) for layer in trainable_layers(block).values() for p in layer.parameters()}
        for name, parameter in block.named_parameters():
            part = self.pieces.part(f"{self.pieces.name(index)}.{name}")
            if id(parameter) in own or parameter.dim() != 1 or not isinstance(part, Whole):
                continue
            stored[parameter], files[parameter] = self.dtypes[part.name], part.name
        return stored, files


def relative_rates(parameters: Sequence[nn.Parameter], rate: float) -> list[tuple[list[nn.Parameter], float]]:
    """Return a learning rate for each parameter: ``rate`` times its root mean square.

    Steps of AdamW have the size of the rate, whatever the gradient is, and scales of a layer are of very
    different sizes: about 1 for inputs and outputs, a thousandth of it for the latent scale.

    Args:
        parameters: scales, norms and biases.
        rate: of a parameter whose root mean square is 1.
    """
    return [
        ([parameter], rate * max(float(parameter.detach().square().mean().sqrt()), _LEAST_SIZE))
        for parameter in parameters
    ]


def trained_parameters(block: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return the latents of a block's packed layers, and their scales and biases."""
    latents: list[nn.Parameter] = []
    scales: list[nn.Parameter] = []
    for layer in trainable_layers(block).values():
        for name, parameter in layer.named_parameters():
            (latents if parameter_kind(f"layer.{name}") == "latent" else scales).append(parameter)
    return latents, scales


def _linear(block: nn.Module, name: str) -> nn.Linear:
    module = block.get_submodule(name)
    assert isinstance(module, nn.Linear)  # as it was chosen
    return module


def _copier(weight: torch.Tensor) -> Callable[[], torch.Tensor]:
    return lambda: weight.detach().clone(memory_format=torch.contiguous_format)


def draw(samples: Sequence[int], size: int, steps: int, seed: int) -> list[list[int]]:
    """Return the sequences of every step: each is seen once before any is seen again."""
    generator = torch.Generator().manual_seed(seed)
    size = min(size, len(samples))
    drawn: list[int] = []
    while len(drawn) < steps * size:
        drawn += [samples[i] for i in torch.randperm(len(samples), generator=generator).tolist()]
    return [drawn[step * size : (step + 1) * size] for step in range(steps)]


def weight_errors(
    packed: PackedLinear, weight: torch.Tensor, importance: Importance | None
) -> dict[str, Any]:
    """Return the squared relative errors of a tuned layer's weight, as reports have them."""
    dense = weight.float()
    difference = dense - dense_weight(packed, torch.float32).to(dense.device)
    plain = float(difference.square().sum() / dense.square().sum())
    weighted = None
    if importance is not None:
        rows, columns = importance.factors((dense.shape[0], dense.shape[1]), dense.dtype, dense.device)
        factors = rows.unsqueeze(1) * columns
        weighted = float((difference * factors).square().sum() / (dense * factors).square().sum())
    return {"error": plain, "weighted_error": weighted, "method": "blockwise"}


class _Clock:
    """Seconds since the last lap."""

    def __init__(self, seconds: dict[str, float]) -> None:
        self._seconds = seconds
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self._seconds[name], self._last = now - self._last, now
