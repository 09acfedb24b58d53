"""The two stages of a layer as layers of their own."""

from __future__ import annotations

import torch

from ..format import PackedLinear, PackedPath

__all__ = ["split_stages"]


def split_stages(packed: PackedLinear) -> tuple[list[PackedLinear], list[PackedLinear]]:
    """Split a two-stage layer where its latents are, so that a server can do something between the stages.

    ``y = sum_p second[p](latents[shares[p]])`` with ``latents[i] = first[i](x)``. The latents are those
    before ``latent_scale``, which the second stages hold. So paths that share a first stage share its
    latents.

    Args:
        packed: a two-stage layer.

    Returns:
        ``(first, second)``, single-stage layers on the tensors of ``packed``. ``first`` has one layer
        ``[R_p, K]`` without bias for each path that has a first stage of its own, in the order of the paths.
        ``second`` has one layer ``[N, R_p]`` for each path; the first of these has the bias.

    Raises:
        TypeError: ``packed`` is not a :class:`PackedLinear`.
        ValueError: it has a single stage.
    """
    if not isinstance(packed, PackedLinear):
        raise TypeError(f"packed must be a PackedLinear, got {type(packed).__name__}")
    if packed.single_stage:
        raise ValueError("packed must be a two-stage layer to be split, got one of a single stage")
    first = [
        PackedLinear((PackedPath(path.v, path.in_scale, torch.ones_like(_latent_scale(path))),))
        for index, path in enumerate(packed.paths)
        if packed.shares[index] == index
    ]
    second = [
        PackedLinear(
            (PackedPath(_signs(path), _latent_scale(path), path.out_scale),),
            packed.bias if index == 0 else None,
        )
        for index, path in enumerate(packed.paths)
    ]
    return first, second


def _signs(path: PackedPath) -> torch.Tensor:
    assert path.u is not None
    return path.u


def _latent_scale(path: PackedPath) -> torch.Tensor:
    assert path.latent_scale is not None
    return path.latent_scale
