"""Layers as named tensors: the portable ``state_dict`` entries of one layer (docs/format.md, "Names").

The names are those of the authors' checkpoints where they exist; path 0 has no suffix, path 1 the
authors' ``_R``, further paths ``_R2``, ``_R3``, ... The authors write ``U_R_packed`` for our ``U_packed_R``;
both are read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch

from .format import PackedLinear, PackedPath

__all__ = [
    "UPSTREAM_EXTRAS",
    "load_latent_scale",
    "load_scale",
    "packed_from_state",
    "packed_to_state",
    "path_suffix",
    "portable_name",
]

#: Scalar buffers that the authors' code stores beside a layer; they carry no weight.
UPSTREAM_EXTRAS = ("_eff_bit_target", "_split_dim_final", "_split_dim_R_final", "_eff_bit_actual")

#: Names listed in one message.
_MOST_NAMES = 8

_UPSTREAM_MATRIX = re.compile(r"([UV])(_R\d*)_(packed|shape)")


def path_suffix(path: int) -> str:
    """Suffix of the tensor names of a path: ``""``, ``"_R"``, ``"_R2"``, ..."""
    return ("", "_R")[path] if path < 2 else f"_R{path}"


def portable_name(name: str) -> str:
    """The name in this format of a stored tensor: ``U_packed_R`` for ``U_R_packed``; others do not change."""
    match = _UPSTREAM_MATRIX.fullmatch(name)
    return f"{match[1]}_{match[3]}{match[2]}" if match else name


def load_scale(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return a stored scale as the format holds it in memory.

    Args:
        name: full tensor name, for messages.
        tensor: ``[size]`` or ``[1, size]``, float32, float16 or bfloat16.

    Returns:
        float32 ``[size]``, contiguous.

    Raises:
        TypeError: it is no tensor, or of another dtype.
        ValueError: it has another shape.
    """
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise TypeError(f"{name} must be float32, float16 or bfloat16, got {tensor.dtype}")
    if tensor.dim() != 1 and (tensor.dim() != 2 or tensor.shape[0] != 1):
        raise ValueError(f"{name} must have shape [size] or [1, size], got {list(tensor.shape)}")
    return tensor.float().reshape(-1).contiguous()


def load_latent_scale(entries: Mapping[str, torch.Tensor], prefix: str, suffix: str) -> torch.Tensor:
    """Return ``latent_scale`` of a path, or the authors' ``v1 * u2`` formed in float32.

    Args:
        entries: tensors by full name.
        prefix: of the layer's names.
        suffix: of the path's names, see :func:`path_suffix`.

    Raises:
        KeyError: neither is there, or only half of the pair; the message names what is missing.
        TypeError: a tensor has a wrong dtype.
        ValueError: a shape is wrong, or both the product and its factors are there.
    """
    own, v1, u2 = (f"{prefix}{name}{suffix}" for name in ("latent_scale", "v1", "u2"))
    if own in entries:
        if v1 in entries or u2 in entries:
            raise ValueError(f"{own} must not be stored together with {v1} and {u2}, whose product it is")
        return load_scale(own, entries[own])
    if v1 not in entries and u2 not in entries:
        raise KeyError(f"{own} is missing")
    for name in (v1, u2):
        if name not in entries:
            raise KeyError(f"{name} is missing")
    factors = [load_scale(name, entries[name]) for name in (v1, u2)]
    if factors[0].shape != factors[1].shape:
        raise ValueError(f"{u2} must have as many entries as {v1} ({len(factors[0])}), got {len(factors[1])}")
    return factors[0] * factors[1]


def packed_to_state(packed: PackedLinear) -> dict[str, torch.Tensor]:
    """Return the layer's tensors under their portable names; values are not copied.

    A path that shares an earlier path's first stage has ``V_shared`` (int64 ``[1]``, the index of
    that path) in place of ``V_packed``, ``V_shape`` and ``v2``.
    """
    state: dict[str, torch.Tensor] = {}
    for index, path in enumerate(packed.paths):
        s = path_suffix(index)
        device = path.v.device
        source = packed.shares[index]
        if source == index:
            state[f"V_packed{s}"] = path.v
            state[f"V_shape{s}"] = torch.tensor([path.rank, path.in_features], device=device)
            state[f"v2{s}"] = path.in_scale.unsqueeze(0)
        else:
            state[f"V_shared{s}"] = torch.tensor([source], device=device)
        if path.u is not None and path.latent_scale is not None:
            state[f"U_packed{s}"] = path.u
            state[f"U_shape{s}"] = torch.tensor([path.out_features, path.rank], device=device)
            state[f"latent_scale{s}"] = path.latent_scale.unsqueeze(0)
        state[f"u1{s}"] = path.out_scale.unsqueeze(0)
    if packed.bias is not None:
        state["bias"] = packed.bias
    return state


def packed_from_state(state: Mapping[str, torch.Tensor], prefix: str = "") -> PackedLinear:
    """Build and check a layer from named tensors, ours or the authors'.

    Args:
        state: the tensors; entries without ``prefix`` are ignored, and so are :data:`UPSTREAM_EXTRAS`.
        prefix: for example ``"model.layers.0.mlp.up_proj."``.

    Returns:
        The layer, its scales converted to float32. Packed words are not copied.

    Raises:
        KeyError: a tensor is missing; the message names it, the layer, and what is there.
        ValueError: an entry is unknown, or shapes and contents do not fit the stored shapes.
        TypeError: a tensor has a wrong dtype.
    """
    entries: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        if name.startswith(prefix):
            key = prefix + portable_name(name[len(prefix) :])
            if key in entries:
                raise ValueError(f"{key} must not be stored twice, under its own and the authors' name")
            entries[key] = tensor
    for extra in UPSTREAM_EXTRAS:
        entries.pop(prefix + extra, None)
    used: set[str] = set()

    def has(name: str) -> bool:
        return prefix + name in entries

    def take(name: str) -> torch.Tensor:
        if not has(name):
            raise KeyError(f"{prefix}{name} is missing{_what_is_there(state, entries, prefix)}")
        used.add(prefix + name)
        return entries[prefix + name]

    def scale(name: str) -> torch.Tensor:
        return load_scale(prefix + name, take(name))

    paths: list[PackedPath] = []
    while not paths or has(f"u1{path_suffix(len(paths))}"):
        s = path_suffix(len(paths))
        if has(f"V_shared{s}"):
            source = _stored_ints(f"{prefix}V_shared{s}", take(f"V_shared{s}"), 1)[0]
            if not 0 <= source < len(paths):
                raise ValueError(f"{prefix}V_shared{s} must name an earlier path, got {source}")
            v, in_scale = paths[source].v, paths[source].in_scale
        else:
            v, in_scale = take(f"V_packed{s}"), scale(f"v2{s}")
            shape = _stored_ints(f"{prefix}V_shape{s}", take(f"V_shape{s}"), 2)
            _check_stored(prefix, f"V_packed{s}", v, shape, in_scale.shape[0])
        u = latent_scale = None
        if has(f"U_packed{s}"):
            u = take(f"U_packed{s}")
            shape = _stored_ints(f"{prefix}U_shape{s}", take(f"U_shape{s}"), 2)
            _check_stored(prefix, f"U_packed{s}", u, shape, v.shape[0])
            latent_scale = load_latent_scale(entries, prefix, s)
            used.update(f"{prefix}{name}{s}" for name in ("latent_scale", "v1", "u2"))
        try:
            paths.append(PackedPath(v, in_scale, scale(f"u1{s}"), u, latent_scale))
        except (TypeError, ValueError) as error:
            raise type(error)(f"{prefix or 'layer'} path {len(paths)}: {error}") from error
    bias = scale("bias") if has("bias") else None
    unknown = sorted(set(entries) - used)
    if unknown:
        raise ValueError(f"unexpected tensors: {', '.join(unknown)}")
    return PackedLinear(tuple(paths), bias)


def _what_is_there(state: Mapping[str, object], entries: Mapping[str, object], prefix: str) -> str:
    """Say beside what a tensor is missing: a misspelt prefix, or a layer that is not whole or not packed."""
    if not prefix:
        return f"; there are {_listed(state)}"
    layer = prefix.removesuffix(".")
    if not entries:
        return f": state must hold tensors of layer {layer!r} under prefix={prefix!r}, got {_listed(state)}"
    if not prefix.endswith("."):
        return f": prefix must end with a dot to name a layer, got {prefix!r}"
    return f": layer {layer!r} has {_listed([name.removeprefix(prefix) for name in entries])}"


def _listed(names: Iterable[str]) -> str:
    listed = sorted(names)
    rest = len(listed) - _MOST_NAMES
    return (", ".join(listed[:_MOST_NAMES]) or "none") + (f" and {rest} more" if rest > 0 else "")


def _stored_ints(name: str, tensor: torch.Tensor, count: int) -> list[int]:
    if not isinstance(tensor, torch.Tensor) or tensor.dtype != torch.int64 or tensor.numel() != count:
        got = type(tensor).__name__
        if isinstance(tensor, torch.Tensor):
            got = f"{tensor.dtype} of shape {list(tensor.shape)}"
        raise ValueError(f"{name} must hold {count} int64, got {got}")
    if tensor.is_meta:
        raise ValueError(f"{name} must hold values, got a tensor on the meta device")
    return [int(value) for value in tensor.flatten()]


def _check_stored(prefix: str, name: str, words: torch.Tensor, shape: list[int], cols: int) -> None:
    """The stored logical shape must agree with the words and with the scale that gives the columns."""
    if not isinstance(words, torch.Tensor):
        raise TypeError(f"{prefix}{name} must be a torch.Tensor, got {type(words).__name__}")
    if words.dim() != 2 or shape != [words.shape[0], cols]:
        raise ValueError(
            f"{prefix}{name.replace('packed', 'shape')} = {shape} does not agree with {prefix}{name} "
            f"of shape {list(words.shape)} and {cols} columns"
        )
