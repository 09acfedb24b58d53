"""Layers as named tensors: the portable ``state_dict`` entries of one layer (docs/format.md, "Names").

The names are those of the authors' checkpoints where they exist; path 0 has no suffix, path 1 the
authors' ``_R``, further paths ``_R2``, ``_R3``, ...
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from .format import PackedLinear, PackedPath

__all__ = ["UPSTREAM_EXTRAS", "fold_latent_scale", "packed_from_state", "packed_to_state", "path_suffix"]

#: Scalar buffers that the authors' code stores beside a layer; they carry no weight.
UPSTREAM_EXTRAS = ("_eff_bit_target", "_split_dim_final", "_eff_bit_actual")


def path_suffix(path: int) -> str:
    """Suffix of the tensor names of a path: ``""``, ``"_R"``, ``"_R2"``, ..."""
    return ("", "_R")[path] if path < 2 else f"_R{path}"


def fold_latent_scale(v1: torch.Tensor, u2: torch.Tensor) -> torch.Tensor:
    """Fold the authors' two rank vectors into ``latent_scale = v1 * u2``, in float32.

    Args:
        v1: ``[1, R]`` or ``[R]``, any floating dtype.
        u2: as ``v1``.

    Returns:
        float32 of the same shape.

    Raises:
        ValueError: the shapes differ.
    """
    if v1.shape != u2.shape:
        raise ValueError(f"v1 and u2 must have equal shapes, got {list(v1.shape)} and {list(u2.shape)}")
    return v1.float() * u2.float()


def packed_to_state(packed: PackedLinear) -> dict[str, torch.Tensor]:
    """Return the layer's tensors under their portable names; values are not copied.

    A path that shares an earlier path's first stage has ``V_shared`` (int64 ``[1]``, the index of
    that path) in place of ``V_packed``, ``V_shape`` and ``v2``.
    """
    state: dict[str, torch.Tensor] = {}
    for index, path in enumerate(packed.paths):
        s = path_suffix(index)
        device = path.v.device
        leader = packed.leaders[index]
        if leader == index:
            state[f"V_packed{s}"] = path.v
            state[f"V_shape{s}"] = torch.tensor([path.rank, path.in_features], device=device)
            state[f"v2{s}"] = path.in_scale.unsqueeze(0)
        else:
            state[f"V_shared{s}"] = torch.tensor([leader], device=device)
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
        KeyError: a tensor is missing; the message names it.
        ValueError: an entry is unknown, or shapes and contents do not fit the stored shapes.
        TypeError: a tensor has a wrong dtype.
    """
    entries = {name[len(prefix) :]: tensor for name, tensor in state.items() if name.startswith(prefix)}
    entries = {name: tensor for name, tensor in entries.items() if name not in UPSTREAM_EXTRAS}
    used: set[str] = set()

    def take(name: str) -> torch.Tensor:
        if name not in entries:
            raise KeyError(f"{prefix}{name} is missing")
        used.add(name)
        return entries[name]

    def scale(name: str) -> torch.Tensor:
        return take(name).float().reshape(-1).contiguous()

    paths: list[PackedPath] = []
    while not paths or f"u1{path_suffix(len(paths))}" in entries:
        s = path_suffix(len(paths))
        if f"V_shared{s}" in entries:
            leader = _stored_ints(prefix + f"V_shared{s}", take(f"V_shared{s}"), 1)[0]
            if not 0 <= leader < len(paths):
                raise ValueError(f"{prefix}V_shared{s} must name an earlier path, got {leader}")
            v, in_scale = paths[leader].v, paths[leader].in_scale
        else:
            v, in_scale = take(f"V_packed{s}"), scale(f"v2{s}")
            shape = _stored_ints(prefix + f"V_shape{s}", take(f"V_shape{s}"), 2)
            _check_stored(prefix, f"V_packed{s}", v, shape, in_scale.shape[0])
        u = latent_scale = None
        if f"U_packed{s}" in entries:
            u = take(f"U_packed{s}")
            shape = _stored_ints(prefix + f"U_shape{s}", take(f"U_shape{s}"), 2)
            _check_stored(prefix, f"U_packed{s}", u, shape, v.shape[0])
            if f"latent_scale{s}" in entries:
                latent_scale = scale(f"latent_scale{s}")
            else:
                latent_scale = fold_latent_scale(scale(f"v1{s}"), scale(f"u2{s}"))
        try:
            paths.append(PackedPath(v, in_scale, scale(f"u1{s}"), u, latent_scale))
        except (TypeError, ValueError) as error:
            raise type(error)(f"{prefix or 'layer'} path {len(paths)}: {error}") from error
    bias = scale("bias") if "bias" in entries else None
    unknown = sorted(set(entries) - used)
    if unknown:
        raise ValueError(f"unexpected tensors: {', '.join(prefix + name for name in unknown)}")
    return PackedLinear(tuple(paths), bias)


def _stored_ints(name: str, tensor: torch.Tensor, count: int) -> list[int]:
    if tensor.dtype not in (torch.int64, torch.int32) or tensor.numel() != count:
        raise ValueError(f"{name} must hold {count} int64, got {tensor.dtype} of shape {list(tensor.shape)}")
    return [int(value) for value in tensor.flatten()]


def _check_stored(prefix: str, name: str, words: torch.Tensor, shape: list[int], cols: int) -> None:
    """The stored logical shape must agree with the words and with the scale that gives the columns."""
    if words.dim() != 2 or shape != [words.shape[0], cols]:
        raise ValueError(
            f"{prefix}{name.replace('packed', 'shape')} = {shape} does not agree with {prefix}{name} "
            f"of shape {list(words.shape)} and {cols} columns"
        )
