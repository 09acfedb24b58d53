"""What a call will do, without doing it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ._native import NativeLibraryError, core
from .dispatch import (
    ACTIVATIONS,
    BackendUnavailableError,
    check_activation,
    check_activation_mode,
    choose_backend,
)
from .format import MAX_DIM, PackedLinear
from .prepacked import PrepackedLinear

__all__ = ["Explanation", "explain"]


@dataclass(frozen=True)
class Explanation:
    """What a call of :func:`littlebit2_kernels.littlebit_linear` does; ``str()`` prints it.

    Attributes:
        backend: the backend that runs.
        reason: why it was chosen.
        tokens: M of the call.
        macs: sign-accumulate operations, all stages and paths.
        packed_bytes: bytes of the layer that one pass reads.
        kernels: ``"lookup"`` on a prepacked layer, ``"portable"`` on the packed words; ``None`` for other
            backends than the CPU's.
        activation: how activations enter the sums, ``"auto"`` resolved.
        isa: CPU instruction set, or ``None`` for other backends.
        threads: threads that get work of a prepacked layer, or that torch offers the call.
        token_block: tokens that one pass over the packed words serves.
        workspace_bytes: scratch memory of the forward call.
        first_stages: first stages computed (paths that share one count once).
    """

    backend: str
    reason: str
    tokens: int
    macs: int
    packed_bytes: int
    kernels: str | None = None
    activation: str | None = None
    isa: str | None = None
    threads: int | None = None
    token_block: int | None = None
    workspace_bytes: int | None = None
    first_stages: int | None = None

    def __str__(self) -> str:
        rows = [(name, value) for name, value in vars(self).items() if value is not None]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def explain(
    x: torch.Tensor | Sequence[int],
    packed: PackedLinear | PrepackedLinear,
    backend: str = "auto",
    activation: str = "auto",
) -> Explanation:
    """Say what ``littlebit_linear(x, packed, backend, activation)`` would do, without doing it.

    Args:
        x: the activations ``[..., K]``, or just their shape, of float32 ones.
        packed: the layer, packed or prepacked.
        backend: as for :func:`littlebit2_kernels.littlebit_linear`.
        activation: likewise.

    Raises:
        TypeError: ``x`` is a tensor of an unsupported dtype, or ``packed`` not a layer.
        ValueError: the last dimension is not K, a dimension is out of range, devices differ, or the name of
            the backend or of the activation is unknown or not served.
        BackendUnavailableError: the backend cannot run.
    """
    if not isinstance(packed, PackedLinear | PrepackedLinear):
        raise TypeError(f"packed must be a PackedLinear or a PrepackedLinear, got {type(packed).__name__}")
    tokens = _tokens(x, packed)
    device_type = packed.device.type
    chosen = choose_backend(backend, device_type)
    prepacked = isinstance(packed, PrepackedLinear)
    check_activation_mode(activation, chosen, prepacked)
    leaders = packed.shares if isinstance(packed, PrepackedLinear) else packed.leaders
    stages = [rank for p, rank in enumerate(packed.ranks) if leaders[p] == p]
    macs = tokens * sum(stages) * packed.in_features
    if not packed.single_stage:
        macs += tokens * sum(packed.ranks) * packed.out_features
    common: dict[str, Any] = {
        "backend": chosen,
        "reason": f"asked for by name ({backend!r})"
        if backend != "auto"
        else f"native kernels for {device_type} tensors",
        "tokens": tokens,
        "macs": macs,
        "packed_bytes": packed.nbytes,
    }
    if chosen != "cpu":
        return Explanation(**common)
    try:
        native = core()
    except NativeLibraryError as error:
        raise BackendUnavailableError(f"backend 'cpu' cannot run: {error}") from error
    if isinstance(packed, PrepackedLinear):
        dtype = str(x.dtype).removeprefix("torch.") if isinstance(x, torch.Tensor) else "float32"
        plan = native.plan_prepacked_cpu(
            packed.layer.numpy(), tokens, dtype, ACTIVATIONS[activation], torch.get_num_threads()
        )
        return Explanation(
            **common,
            kernels="lookup",
            activation=next(name for name, value in ACTIVATIONS.items() if value == plan["activation"]),
            isa=plan["isa"],
            threads=plan["workers"],
            token_block=plan["token_block"],
            workspace_bytes=plan["workspace_bytes"],
            first_stages=len(stages),
        )
    plan = native.plan_cpu(
        tokens,
        packed.in_features,
        packed.out_features,
        list(packed.ranks),
        packed.single_stage,
        list(leaders),
    )
    return Explanation(
        **common,
        kernels="portable",
        activation="exact",
        isa=plan["isa"],
        threads=torch.get_num_threads(),
        token_block=plan["token_block"],
        workspace_bytes=plan["forward_workspace_bytes"],
        first_stages=plan["first_stages"],
    )


def _tokens(x: torch.Tensor | Sequence[int], packed: PackedLinear | PrepackedLinear) -> int:
    if isinstance(x, torch.Tensor):
        check_activation(x, packed.in_features, packed.device)
    shape = tuple(x.shape) if isinstance(x, torch.Tensor) else tuple(x)
    if not shape or shape[-1] != packed.in_features:
        raise ValueError(f"x.size(-1) must equal K={packed.in_features}, got shape {list(shape)}")
    tokens = 1
    for size in shape[:-1]:
        tokens *= size
    if min(shape) < 0 or tokens > MAX_DIM:
        raise ValueError(f"x must have between 0 and {MAX_DIM} tokens, got shape {list(shape)}")
    return tokens
