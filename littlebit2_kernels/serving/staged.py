"""``StagedLinear``: the two stages of a layer as two calls, with float32 latents between them."""

from __future__ import annotations

import torch
from torch import nn

from ..format import PackedLinear
from .joined import JoinedLinear
from .stages import split_stages

__all__ = ["StagedLinear"]


class StagedLinear(nn.Module):
    """A two-stage layer that hands out its latents: for sums over devices that hold parts of its inputs.

    ``outputs(latents(x), x.dtype)`` is the layer. Where K is divided among devices, each has the layer of its
    columns (:func:`littlebit2_kernels.slice_columns`), and the latents of all add up to those of the whole:
    R float32 numbers for a token instead of N outputs.

    Args:
        packed: a two-stage layer; its bias is added by :meth:`outputs`.
        backend: see :class:`JoinedLinear`.
        activation: likewise. In ``"auto"``, latents count as of the dtype of the outputs.
        prepacks: likewise.

    Attributes:
        in_features: K.
        out_features: N.
        latent_features: numbers of a token's latents: the ranks of the first stages that are not shared.

    Raises:
        TypeError, NativeLibraryError: as :class:`JoinedLinear`.
        ValueError: ``packed`` has a single stage; or as :class:`JoinedLinear`.
    """

    def __init__(
        self,
        packed: PackedLinear,
        *,
        backend: str = "auto",
        activation: str = "auto",
        prepacks: bool = True,
    ) -> None:
        super().__init__()
        first, second = split_stages(packed)
        self.first = JoinedLinear(
            first, out_dtype=torch.float32, backend=backend, activation=activation, prepacks=prepacks
        )
        self.second = nn.ModuleList(
            JoinedLinear([layer], backend=backend, activation=activation, prepacks=prepacks)
            for layer in second
        )
        self.in_features = packed.in_features
        self.out_features = packed.out_features
        self.latent_features = self.first.out_features
        # Where the latents of each path begin and end.
        begins = {}
        begin = 0
        for index, source in enumerate(packed.shares):
            if source == index:
                begins[index] = begin
                begin += packed.paths[index].rank
        self._bounds = [
            (begins[source], begins[source] + packed.paths[index].rank)
            for index, source in enumerate(packed.shares)
        ]

    def latents(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``x`` ``[..., K]`` to float32 latents ``[..., latent_features]``."""
        return self.first(x)

    def outputs(self, latents: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Map float32 latents ``[..., latent_features]`` to ``[..., N]`` of ``dtype``, bias included.

        Raises:
            TypeError: ``latents`` are not float32.
            ValueError: the last dimension of ``latents`` is not ``latent_features``.
        """
        if latents.dtype != torch.float32:
            raise TypeError(f"latents must be float32, got {latents.dtype}")
        if latents.dim() == 0 or latents.shape[-1] != self.latent_features:
            raise ValueError(
                f"latents.size(-1) must equal {self.latent_features}, got shape {list(latents.shape)}"
            )
        single = len(self._bounds) == 1
        total: torch.Tensor | None = None
        for layer, (begin, end) in zip(self.second, self._bounds, strict=True):
            assert isinstance(layer, JoinedLinear)
            part = layer.call(
                latents if single else latents[..., begin:end],
                out_dtype=dtype if single else torch.float32,
                activation=layer.auto_activation(dtype),
            )
            total = part if total is None else total + part
        assert total is not None
        return total.to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``x`` ``[..., K]`` to ``[..., N]`` in its dtype."""
        return self.outputs(self.latents(x), x.dtype)
