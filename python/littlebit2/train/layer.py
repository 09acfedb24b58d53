"""``TrainableLittleBitLinear``: a layer of float latents and scales that packs to what it computes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from littlebit2_kernels.format import PackedLinear, PackedPath
from littlebit2_kernels.packing import pack_signs

from .function import binary_path
from .latents import MAGNITUDE, starting_latents
from .surrogate import Surrogate, check_surrogate

__all__ = ["TrainableLittleBitLinear", "TrainablePath"]

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class TrainablePath(nn.Module):
    """The parameters of one path; computes nothing by itself.

    Attributes:
        V: latent ``[R, K]``, or ``None`` for a path that uses an earlier path's first stage.
        U: latent ``[N, R]``.
        in_scale: ``[K]``, or ``None`` likewise.
        latent_scale: ``[R]``, one vector as the format stores it.
        out_scale: ``[N]``.
    """

    def __init__(self, path: PackedPath, v: torch.Tensor | None, u: torch.Tensor) -> None:
        super().__init__()
        assert path.latent_scale is not None  # starting_latents takes two-stage paths alone
        self.V = None if v is None else nn.Parameter(v)
        self.U = nn.Parameter(u)
        self.in_scale = None if v is None else nn.Parameter(path.in_scale.clone())
        self.latent_scale = nn.Parameter(path.latent_scale.clone())
        self.out_scale = nn.Parameter(path.out_scale.clone())


class TrainableLittleBitLinear(nn.Module):
    """A layer in training: ``y = sum out_scale * sign(U) (latent_scale * (sign(V) (in_scale * x))) + bias``.

    Forward takes hard signs in training and evaluation alike, so that there is one function:
    :meth:`packed` is that function in the packed format. On float32 input without autocast it is, bit for
    bit, ``littlebit_linear(x, layer.packed(), backend="reference")``; the kernels agree with both to their
    own rounding (about 3e-7 with ``activation="exact"``).

    Products are taken in the dtype of the input, or in autocast's. Parameters are float32 masters; after
    ``.to(torch.bfloat16)`` the layer works too, but small steps are then lost to rounding.

    Args:
        packed: where training starts: two-stage paths, which may share first stages.
        weight: the dense ``[N, K]`` that ``packed`` approximates; tells latents how far from flipping they
            are (:mod:`.latents`). Without it all start at the same distance.
        surrogate: derivative used for the sign in backward (:mod:`.surrogate`).
        magnitude: start value of a latent with confidence 1.

    Raises:
        TypeError: ``packed`` is not a :class:`PackedLinear`.
        ValueError: an argument is out of its range, or ``packed`` has a single stage.
    """

    def __init__(
        self,
        packed: PackedLinear,
        weight: torch.Tensor | None = None,
        *,
        surrogate: Surrogate = "smooth-sign",
        magnitude: float = MAGNITUDE,
    ) -> None:
        super().__init__()
        if not isinstance(packed, PackedLinear):
            raise TypeError(f"packed must be a PackedLinear, got {type(packed).__name__}")
        check_surrogate(surrogate)
        #: Sizes, ranks, and for each path the one whose V and in_scale it uses.
        self.shape = packed.shape
        self.in_features = packed.in_features
        self.out_features = packed.out_features
        self.surrogate: Surrogate = surrogate
        latents = starting_latents(packed, weight, magnitude)
        self.paths = nn.ModuleList(
            TrainablePath(path, v, u) for path, (v, u) in zip(packed.paths, latents, strict=True)
        )
        self.bias = None if packed.bias is None else nn.Parameter(packed.bias.clone())

    @property
    def weight(self) -> torch.Tensor:
        """An empty tensor that tells code which asks for them the dtype and device of the parameters."""
        scale: Any = self.paths[0].out_scale
        return torch.empty(0, dtype=scale.dtype, device=scale.device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``x`` ``[..., K]`` to ``[..., N]``, of its dtype or autocast's.

        Raises:
            TypeError: ``x`` is not a floating-point tensor of up to 64 bits.
            ValueError: its last dimension is not K.
        """
        if not isinstance(x, torch.Tensor) or x.dtype not in _DTYPES:
            got = x.dtype if isinstance(x, torch.Tensor) else type(x).__name__
            raise TypeError(f"x must be a floating-point tensor, got {got}")
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise ValueError(f"x.size(-1) must equal K={self.in_features}, got shape {list(x.shape)}")
        device = x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        rows = x.reshape(-1, self.in_features)
        y: torch.Tensor | None = None
        paths: Any = self.paths  # whose attributes are known to be tensors
        for path, leader in zip(paths, self.shape.shares, strict=True):
            first = paths[leader]
            one = binary_path(
                rows,
                first.V,
                first.in_scale,
                path.U,
                path.latent_scale,
                path.out_scale,
                self.surrogate,
            )
            y = one if y is None else y + one
        assert y is not None  # a layer has a path
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)
        return y.reshape(*x.shape[:-1], self.out_features)

    def packed(self, state: dict[str, torch.Tensor] | None = None) -> PackedLinear:
        """Return the layer in the packed format, scales in float32.

        Args:
            state: the layer's tensors by their names in its ``state_dict``, where its own parameters are
                sharded over processes.

        Raises:
            KeyError: ``state`` lacks a tensor.
            ValueError: a latent is NaN, or a scale not finite.
        """
        tensors = self.state_dict() if state is None else state

        def scale(name: str) -> torch.Tensor:
            return tensors[name].detach().to(torch.float32, copy=True).contiguous()

        paths: list[PackedPath] = []
        for p, leader in enumerate(self.shape.shares):
            own = leader == p
            paths.append(
                PackedPath(
                    v=pack_signs(tensors[f"paths.{p}.V"].detach()) if own else paths[leader].v,
                    in_scale=scale(f"paths.{p}.in_scale") if own else paths[leader].in_scale,
                    out_scale=scale(f"paths.{p}.out_scale"),
                    u=pack_signs(tensors[f"paths.{p}.U"].detach()),
                    latent_scale=scale(f"paths.{p}.latent_scale"),
                )
            )
        return PackedLinear(tuple(paths), None if self.bias is None else scale("bias"))

    def latents(self) -> dict[str, nn.Parameter]:
        """Return the parameters whose signs are the packed bits, by their names in the layer."""
        return {name: p for name, p in self.named_parameters() if name.endswith((".U", ".V"))}

    def extra_repr(self) -> str:
        """Shape, ranks and surrogate."""
        return f"{self.shape}, bias={self.bias is not None}, surrogate={self.surrogate!r}"
