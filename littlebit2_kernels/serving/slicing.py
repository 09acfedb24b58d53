"""Parts of a packed layer: some of its outputs, or some of its inputs. Exact, at any bounds."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ..format import WORD_BITS, PackedLinear, PackedPath, words_per_row

__all__ = ["select_rows", "slice_columns", "slice_rows"]

_Map = Callable[[torch.Tensor], torch.Tensor]


def slice_rows(packed: PackedLinear, start: int, stop: int) -> PackedLinear:
    """Return the layer of outputs ``start`` to ``stop``: rows ``[start:stop]`` of its dense weight.

    Args:
        packed: the layer, on any device.
        start: first output, at least 0.
        stop: one past the last, at most N.

    Returns:
        A layer of K inputs and ``stop - start`` outputs, with these entries of the bias. Its first stage is
        that of ``packed``, the same tensors; in a single-stage layer nothing is shared.

    Raises:
        TypeError: ``packed`` is not a :class:`PackedLinear`, or a bound is not an integer.
        ValueError: the bounds are not ``0 <= start < stop <= N``.
    """
    return select_rows(packed, [(start, stop)])


def select_rows(packed: PackedLinear, ranges: Sequence[tuple[int, int]]) -> PackedLinear:
    """Return the layer of several ranges of outputs, one after another; see :func:`slice_rows`.

    This is a part of a projection that holds others side by side, such as query, key and value.

    Args:
        packed: the layer, on any device.
        ranges: bounds ``(start, stop)`` of each range, in the order of the results.

    Raises:
        TypeError: as :func:`slice_rows`.
        ValueError: there is no range, or bounds are not ``0 <= start < stop <= N``.
    """
    _check_packed(packed)
    if len(ranges) == 0:
        raise ValueError("ranges must hold at least one (start, stop), got none")
    for start, stop in ranges:
        _check_bounds(start, stop, "N", packed.out_features)

    def rows(tensor: torch.Tensor) -> torch.Tensor:
        # A copy, also of one range: a view would keep the memory of the whole layer.
        return torch.cat([tensor[start:stop] for start, stop in ranges]).contiguous()

    if packed.single_stage:
        return _mapped(packed, v=rows, out_scale=rows, bias=rows)
    return _mapped(packed, u=rows, out_scale=rows, bias=rows)


def slice_columns(packed: PackedLinear, start: int, stop: int, *, keep_bias: bool = False) -> PackedLinear:
    """Return the layer of inputs ``start`` to ``stop``: columns ``[start:stop]`` of its dense weight.

    The results of all parts of a layer add up to that of the layer. The bias must then be added once.

    Args:
        packed: the layer, on any device.
        start: first input, at least 0. Where it is not a multiple of 32, the words are packed anew.
        stop: one past the last, at most K.
        keep_bias: whether the part has the layer's bias.

    Returns:
        A layer of ``stop - start`` inputs and N outputs.

    Raises:
        TypeError: ``packed`` is not a :class:`PackedLinear`, or a bound is not an integer.
        ValueError: the bounds are not ``0 <= start < stop <= K``.
    """
    _check_packed(packed)
    _check_bounds(start, stop, "K", packed.in_features)
    part = _mapped(
        packed,
        v=lambda words: _columns_of_words(words, start, stop),
        in_scale=lambda scale: scale[start:stop].clone(),
    )
    return part if keep_bias else PackedLinear(part.paths)


def _columns_of_words(words: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """Signs ``start`` to ``stop`` of packed rows ``[rows, words]``, packed, with pad bits of zero."""
    first, shift = divmod(start, WORD_BITS)
    count = words_per_row(stop - start)
    # As int64 without sign, so that shifts bring in zeros.
    wide = words[:, first : first + count + 1].to(torch.int64) & 0xFFFFFFFF
    wide = torch.nn.functional.pad(wide, (0, count + 1 - wide.shape[1]))
    taken = (wide[:, :count] >> shift) | (wide[:, 1:] << (WORD_BITS - shift))
    taken &= 0xFFFFFFFF
    tail = (stop - start) % WORD_BITS
    if tail:
        taken[:, -1] &= (1 << tail) - 1
    return torch.where(taken >= 2**31, taken - 2**32, taken).to(torch.int32)


def _mapped(packed: PackedLinear, **maps: _Map) -> PackedLinear:
    """Change tensors of a layer by field name; what paths share stays shared."""
    known: dict[int, torch.Tensor] = {}

    def change(name: str, tensor: torch.Tensor | None) -> torch.Tensor | None:
        if tensor is None or name not in maps:
            return tensor
        if id(tensor) not in known:
            known[id(tensor)] = maps[name](tensor)
        return known[id(tensor)]

    paths = [
        PackedPath(
            v=change("v", path.v),  # type: ignore[arg-type]
            in_scale=change("in_scale", path.in_scale),  # type: ignore[arg-type]
            out_scale=change("out_scale", path.out_scale),  # type: ignore[arg-type]
            u=change("u", path.u),
            latent_scale=change("latent_scale", path.latent_scale),
        )
        for path in packed.paths
    ]
    return PackedLinear(tuple(paths), change("bias", packed.bias))


def _check_packed(packed: PackedLinear) -> None:
    if not isinstance(packed, PackedLinear):
        raise TypeError(f"packed must be a PackedLinear, got {type(packed).__name__}")


def _check_bounds(start: int, stop: int, size_name: str, size: int) -> None:
    for name, bound in (("start", start), ("stop", stop)):
        if isinstance(bound, bool) or not isinstance(bound, int):
            raise TypeError(f"{name} must be an integer, got {bound!r}")
    if not 0 <= start < stop <= size:
        raise ValueError(f"bounds must be 0 <= start < stop <= {size_name}={size}, got {start} and {stop}")
