"""Which inputs and outputs of a layer matter, and the weighting of the error by them.

The error that a quantized layer makes on its outputs is ``|(W - W_hat) x|^2``, not ``|W - W_hat|^2``. With
diagonal weights the two differ by scales only: ``diag(o) (W - W_hat) diag(i)`` is the plain error of the
weight ``diag(o) W diag(i)``, whose scales are divided by ``o`` and ``i`` afterwards. So every method serves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from littlebit2.architecture.expansion import expanded
from littlebit2.disk import write_file

from .solvers.numerics import check_finite, squared_norm

__all__ = [
    "Importance",
    "collect_importance",
    "importance_tensors",
    "load_importance",
    "save_importance",
]

#: Least weight relative to the root mean square: a channel that was never active must stay representable.
_FLOOR = 1e-2


@dataclass(frozen=True, eq=False)
class Importance:
    """Mean squares by which the squared error of a weight ``[N, K]`` is weighted.

    Attributes:
        inputs: ``[K]``, non-negative, of the layer's inputs; ``None``: all alike.
        outputs: ``[N]``, non-negative, of the loss's gradient with respect to the outputs; likewise.
    """

    inputs: torch.Tensor | None = None
    outputs: torch.Tensor | None = None

    def factors(
        self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the factors ``o`` ``[N]`` of rows and ``i`` ``[K]`` of columns, root mean square about 1.

        Raises:
            TypeError: a weight is not a floating-point tensor.
            ValueError: a weight has another shape, is negative, NaN or infinite, or all of them are zero.
        """
        like = torch.empty(0, dtype=dtype, device=device)
        rows, columns = shape
        return _factor("outputs", self.outputs, rows, like), _factor("inputs", self.inputs, columns, like)

    def stake(self, weighted: torch.Tensor) -> float:
        """Return what losing the whole of a layer would cost: with both sides known, in units of the loss.

        Args:
            weighted: ``[N, K]``, the weight times :meth:`factors`.
        """
        if self.inputs is None or self.outputs is None:
            return 1.0
        return (
            float(self.inputs.double().mean()) * float(self.outputs.double().mean()) * squared_norm(weighted)
        )


def _factor(name: str, squares: torch.Tensor | None, size: int, like: torch.Tensor) -> torch.Tensor:
    if squares is None:
        return like.new_ones(size)
    if not isinstance(squares, torch.Tensor) or not squares.is_floating_point():
        got = squares.dtype if isinstance(squares, torch.Tensor) else type(squares).__name__
        raise TypeError(f"importance.{name} must be a real floating-point tensor, got {got}")
    if tuple(squares.shape) != (size,):
        raise ValueError(f"importance.{name} must have shape [{size}], got {list(squares.shape)}")
    check_finite(f"importance.{name}", squares)
    squares = squares.detach().double()
    mean = float(squares.mean())
    if mean <= 0 or float(squares.min()) < 0:
        raise ValueError(
            f"importance.{name} must be non-negative and not all zero, got mean {mean:.3g} and "
            f"least {float(squares.min()):.3g}"
        )
    return (squares / mean).sqrt().clamp(min=_FLOOR).to(like)


def collect_importance(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    loss: Callable[[Any], torch.Tensor] | None = None,
    run: Callable[[nn.Module, Any], Any] | None = None,
    per_output: bool = False,
) -> dict[str, Importance]:
    """Measure the importance of every ``nn.Linear``'s inputs, and of its outputs if ``loss`` is given.

    Args:
        model: any module; its mode and parameters are left as they are, gradients are not kept.
        batches: calibration data, a few batches.
        loss: makes a scalar of what ``run`` returns (for a transformers model given labels,
            ``lambda output: output.loss``); its gradient then says which outputs matter.
        run: calls the model on one batch; by default ``model(**batch)`` for mappings, ``model(*batch)`` for
            tuples and lists, else ``model(batch)``.
        per_output: whether each output has an importance of its own. By default all of a layer share their
            mean, which settles what the layer is worth beside others and served better on MiniLM.

    Returns:
        By module name, for every linear module that was called with at least one token.

    Raises:
        ValueError: ``batches`` is empty, no ``nn.Linear`` was called, or there is a ``loss`` and no parameter
            that requires a gradient.
    """
    call = run or _call
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if loss is not None and not wanted:
        raise ValueError("model must have parameters that require gradients where loss is given, got none")
    inputs: dict[str, _MeanSquare] = {}
    outputs: dict[str, _MeanSquare] = {}
    count = 0
    with expanded(model), _watched(model, inputs, outputs if loss else None):
        for batch in batches:
            count += 1
            with torch.set_grad_enabled(loss is not None):
                result = call(model, batch)
                if loss is not None:
                    torch.autograd.grad(loss(result), wanted, allow_unused=True)
    if not count:
        raise ValueError("batches must hold at least one batch, got none")
    if not inputs:
        raise ValueError("model must call at least one nn.Linear, got none")
    found = {}
    for name, seen in inputs.items():
        of_outputs = outputs[name].mean() if name in outputs else None
        if of_outputs is not None and not per_output:
            of_outputs = of_outputs.mean().expand(len(of_outputs))
        found[name] = Importance(seen.mean(), of_outputs)
    return found


def importance_tensors(importance: Mapping[str, Importance]) -> dict[str, torch.Tensor]:
    """Return the weights as tensors ``NAME.inputs`` and ``NAME.outputs``."""
    return {
        f"{name}.{side}": tensor.detach().cpu().contiguous()
        for name, one in importance.items()
        for side, tensor in (("inputs", one.inputs), ("outputs", one.outputs))
        if tensor is not None
    }


def save_importance(path: str | Path, importance: Mapping[str, Importance]) -> None:
    """Write importances to a safetensors file, which appears whole, replacing an earlier one.

    Raises:
        OSError: it cannot be written.
    """
    write_file(Path(path), save(importance_tensors(importance)))


def load_importance(path: str | Path) -> dict[str, Importance]:
    """Read what :func:`save_importance` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        IsADirectoryError: it is a directory.
        ValueError: it is no safetensors file, or holds other tensors.
    """
    if Path(path).is_dir():
        raise IsADirectoryError(f"importance must be a safetensors file, got {path}, which is a directory")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: is not a readable safetensors file: {error}") from error
    sides: dict[str, dict[str, torch.Tensor]] = {}
    for full, tensor in tensors.items():
        name, _, side = full.rpartition(".")
        if not name or side not in ("inputs", "outputs"):
            raise ValueError(f"{path}: tensors must be named NAME.inputs or NAME.outputs, got {full!r}")
        sides.setdefault(name, {})[side] = tensor
    return {name: Importance(**given) for name, given in sides.items()}


class _MeanSquare:
    """Mean over tokens of the squares of every channel, in float64."""

    def __init__(self, channels: int) -> None:
        self.total = torch.zeros(channels, dtype=torch.float64)
        self.tokens = 0

    def add(self, values: torch.Tensor) -> None:
        flat = values.detach().reshape(-1, values.shape[-1])
        self.total += flat.double().square().sum(0).cpu()
        self.tokens += flat.shape[0]

    def mean(self) -> torch.Tensor:
        return (self.total / self.tokens).float()


@contextmanager
def _watched(
    model: nn.Module, inputs: dict[str, _MeanSquare], outputs: dict[str, _MeanSquare] | None
) -> Iterator[None]:
    def watch(name: str, linear: nn.Linear) -> Callable[..., None]:
        def hook(_: nn.Module, arguments: tuple[torch.Tensor, ...], result: torch.Tensor) -> None:
            if not arguments[0].numel():
                return
            inputs.setdefault(name, _MeanSquare(linear.in_features)).add(arguments[0])
            if outputs is not None and result.requires_grad:
                seen = outputs.setdefault(name, _MeanSquare(linear.out_features))
                result.register_hook(seen.add)

        return hook

    handles = [
        module.register_forward_hook(watch(name, module))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _call(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)
