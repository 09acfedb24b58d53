"""Whether the dense factors of a layer fit float16, and the powers of two that bring them there.

A power of two moves from one scale of a path to the next without a change of what the path computes, so
``in_scale`` can be brought to a length below 1/4 at the expense of ``latent_scale``. By Cauchy and Schwarz no
latent is then larger than a quarter of the length of its token, and latents are about as large as ``x``;
what the layer amplifies is in ``out_scale * latent_scale``, as it is in the entries of a dense weight.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from ..format import holds_values
from .operands import Operand, Operands

__all__ = ["Balance", "balanced", "find_balance", "fits_float16"]

_LARGEST = torch.finfo(torch.float16).max
_SMALLEST_NORMAL = torch.finfo(torch.float16).smallest_normal

#: in_scale is brought to a length in ``[2**-3, 2**-2)``: large enough for latents of small tokens to be
#: normal numbers, small enough for the latents of tokens that are four times as long as float16's largest
#: number to be finite.
_HEADROOM = 2

#: Part of the channels that may have factors below float16's normal numbers: few are not worth a refusal, for
#: what they lose is absolute, and of the size of what the others' rounding leaves.
_FEW = 0.01

#: Exponents that are float32's with room for products and rounding.
_LARGEST_SHIFT, _LEAST_EXPONENT, _LARGEST_EXPONENT = 126, -100, 127


@dataclass(frozen=True)
class Balance:
    """How a layer is unpacked in float16.

    Attributes:
        shifts: for each path the ``s`` of ``in_scale * 2**s`` and ``latent_scale * 2**-s``; 0 of a single
            stage, whose factor has both scales in it.
        problem: why the layer does not fit, or ``None`` if it does.
    """

    shifts: tuple[int, ...]
    problem: str | None = None


@dataclass(frozen=True)
class _Known:
    storages: tuple[StorageWeakRef, ...]
    versions: tuple[int, ...]
    balance: Balance


#: By addresses and sizes of a layer's scales. Only numbers are kept, and nothing alive: what is computed with
#: them are the scales as they then are.
_known: dict[tuple[tuple[int, int], ...], _Known] = {}
_lock = threading.Lock()
_sweep_at = 64


def fits_float16(operands: Operands) -> bool:
    """Whether ``backend="blas"`` takes float16 for such a layer, as far as that may be found out now."""
    found = find_balance(operands)
    return found is not None and found.problem is None


def balanced(operands: Operands) -> Operands:
    """Return the layer with scales whose factors fit float16: the same function, but for no bit of it.

    On the GPU by one launch for all scales, so that a captured graph follows changes of them.

    Raises:
        ValueError: the layer does not fit; the message says why.
        RuntimeError: nobody looked at the layer before, and a CUDA graph is being captured.
    """
    found = find_balance(operands)
    if found is None:
        raise RuntimeError(
            "backend='blas' has to read the scales of a layer before its first float16 call, which a CUDA "
            "graph cannot capture: call littlebit2_kernels.warmup(layer, torch.float16), or the layer, before"
        )
    if found.problem is not None:
        raise ValueError(
            "x must be float32 or bfloat16 for backend='blas', or the layer one whose factors fit float16; "
            f"got torch.float16, and {found.problem}. The other backends serve it"
        )
    v, u, in_scale, latent_scale, out_scale = operands
    if latent_scale is None or not any(found.shifts):
        return operands
    factors = [2.0**shift for shift in found.shifts] + [2.0**-shift for shift in found.shifts]
    moved = torch._foreach_mul([*in_scale, *latent_scale], factors)
    return v, u, list(moved[: len(v)]), list(moved[len(v) :]), out_scale


def find_balance(operands: Operands) -> Balance | None:
    """Look up a layer's :class:`Balance`, or find it, for which the device is waited for.

    What was found holds until a scale is changed in place, as torch counts it (not through ``.data``, and
    not in inference tensors): a layer that was changed behind torch's back is still computed right, but by
    powers of two, and by an answer to whether it fits, that are those of the scales before.

    Args:
        operands: ``(v, u, in_scale, latent_scale, out_scale)``, float32 scales on one device.

    Returns:
        ``None`` if it is not known and a CUDA graph is being captured. Layers without values (fake or meta
        tensors) are taken to fit.
    """
    _, _, in_scale, latent_scale, out_scale = operands
    scales = [*in_scale, *(latent_scale or ()), *out_scale]
    without_values = Balance((0,) * len(in_scale))
    for scale in scales:  # what has no address either
        if scale.is_meta or isinstance(scale, torch._subclasses.FakeTensor):
            return without_values
    key = tuple((scale.data_ptr(), scale.numel()) for scale in scales)
    versions = tuple(0 if scale.is_inference() else scale._version for scale in scales)
    known = _known.get(key)
    if known is not None and known.versions == versions and _are_held(scales, known.storages):
        return known.balance
    if not holds_values(scales[0]):
        return without_values
    if _is_capturing(scales[0].device):
        return None
    storages = tuple(StorageWeakRef(scale.untyped_storage()) for scale in scales)
    found = _measure(*_on_host(operands))
    with _lock:
        _sweep()
        _known[key] = _Known(storages, versions, found)
    return found


def _is_capturing(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def _are_held(scales: Sequence[torch.Tensor], storages: Sequence[StorageWeakRef]) -> bool:
    # A weak reference keeps the address of a storage, though not its memory, from being used again.
    return all(
        scale.untyped_storage()._cdata == storage.cdata
        for scale, storage in zip(scales, storages, strict=True)
    )


def _sweep() -> None:
    """Forget layers that are no more, now and then."""
    global _sweep_at
    if len(_known) < _sweep_at:
        return
    for key in [key for key, known in _known.items() if any(one.expired() for one in known.storages)]:
        del _known[key]
    _sweep_at = max(64, 2 * len(_known))


def _on_host(operands: Operands) -> tuple[Operand, Operand, Operand | None]:
    """``in_scale``, ``out_scale`` and ``latent_scale`` as float64 vectors on the CPU, by one transfer."""
    _, _, in_scale, latent_scale, out_scale = operands
    scales = [scale.detach().flatten() for scale in (*in_scale, *out_scale, *(latent_scale or ()))]
    parts = torch.cat(scales).cpu().double().split([scale.numel() for scale in scales])
    paths = len(in_scale)
    return list(parts[:paths]), list(parts[paths : 2 * paths]), list(parts[2 * paths :]) or None


def _measure(
    in_scale: list[torch.Tensor], out_scale: list[torch.Tensor], latent_scale: list[torch.Tensor] | None
) -> Balance:
    unmoved = (0,) * len(in_scale)
    for name, scales in (("in_scale", in_scale), ("latent_scale", latent_scale), ("out_scale", out_scale)):
        for p, scale in enumerate(scales or ()):
            if not bool(torch.isfinite(scale).all()):
                return Balance(unmoved, f"{name}[{p}] must be finite")
    if latent_scale is None:
        return Balance(unmoved, _problem_of_one_stage(in_scale, out_scale))
    shifts = tuple(map(_shift_of, in_scale))
    for p, shift in enumerate(shifts):
        largest = _largest(latent_scale[p]) * 2.0**-shift
        exponents = 2.0**_LEAST_EXPONENT, 2.0**_LARGEST_EXPONENT
        if abs(shift) > _LARGEST_SHIFT or (largest and not exponents[0] <= largest <= exponents[1]):
            problem = f"2**{-shift} cannot move from in_scale[{p}] to latent_scale[{p}] in float32"
            return Balance(unmoved, problem)
    moved_in = [scale * 2.0**shift for scale, shift in zip(in_scale, shifts, strict=True)]
    moved_latent = [scale * 2.0**-shift for scale, shift in zip(latent_scale, shifts, strict=True)]
    return Balance(shifts, _problem_of_two_stages(moved_in, moved_latent, out_scale))


def _shift_of(in_scale: torch.Tensor) -> int:
    length = float(torch.linalg.vector_norm(in_scale))
    return -math.frexp(length)[1] - _HEADROOM if length else 0


def _problem_of_two_stages(
    in_scale: list[torch.Tensor], latent_scale: list[torch.Tensor], out_scale: list[torch.Tensor]
) -> str | None:
    largest = max(
        _largest(latent) * _largest(out) for latent, out in zip(latent_scale, out_scale, strict=True)
    )
    if largest > _LARGEST:
        return f"out_scale * latent_scale reaches {largest:.3g} where in_scale is of a length below 1/4"
    # Of tokens of random numbers: what an output channel has from all paths, beside the entries that round
    # for it; and what an input channel gives to all.
    zero = torch.zeros((), dtype=torch.float64)
    out_energy, out_entries, in_energy, in_entries = zero, zero, zero, zero
    for inputs, latents, outputs in zip(in_scale, latent_scale, out_scale, strict=True):
        token = inputs.square().sum()
        out_energy = out_energy + outputs.square() * latents.square().sum() * token
        out_entries = out_entries + (outputs != 0) * torch.count_nonzero(latents) * token
        rest = latents.square().sum() * outputs.square().sum()
        in_energy = in_energy + inputs.square() * rest
        in_entries = in_entries + (inputs != 0) * rest
    return _problem_of_channels("output", out_energy, out_entries) or _problem_of_channels(
        "input", in_energy, in_entries
    )


def _problem_of_one_stage(in_scale: list[torch.Tensor], out_scale: list[torch.Tensor]) -> str | None:
    largest = sum(_largest(inputs) * _largest(out) for inputs, out in zip(in_scale, out_scale, strict=True))
    if largest > _LARGEST:
        return f"out_scale * in_scale reaches {largest:.3g}"
    ins, outs = torch.stack(in_scale).square(), torch.stack(out_scale).square()
    paths = list(zip(ins, outs, strict=True))
    out_energy = torch.stack([out * inputs.sum() for inputs, out in paths]).sum(0)
    in_energy = torch.stack([inputs * out.sum() for inputs, out in paths]).sum(0)
    return _problem_of_channels(
        "output", out_energy, torch.count_nonzero(in_energy).double()
    ) or _problem_of_channels("input", in_energy, torch.count_nonzero(out_energy).double())


def _problem_of_channels(kind: str, energy: torch.Tensor, entries: torch.Tensor) -> str | None:
    """Whether the root mean square of a channel's entries is no normal number, of too many channels."""
    used = int(torch.count_nonzero(energy))
    small = int(torch.count_nonzero((energy > 0) & (energy < entries * _SMALLEST_NORMAL**2)))
    if small <= _FEW * used:
        return None
    least = f"{_SMALLEST_NORMAL:.3g}, its smallest normal number"
    return f"{small} of {used} {kind} channels have factors below {least}"


def _largest(scale: torch.Tensor) -> float:
    return float(scale.abs().max())
