"""The linear method: packed layers from their tensors, one operator for each module of a server."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from littlebit2.checkpoint import CheckpointError
from littlebit2_kernels import JoinedLinear, PackedLinear, StagedLinear, warmup

from .completeness import Completeness
from .layers import Part
from .placeholders import Placeholders
from .placement import Placement

__all__ = ["PackedLinearBase"]

#: Bytes of an entry of latents.
_LATENT_BYTES = 4


class PackedLinearBase:
    """How one linear module of a server is made, loaded and run; each module has an instance of its own.

    The plugin of a server derives from this class and from the server's class of linear methods.

    Args:
        parts: the packed layers of the module.
        backend: of every call, see :func:`littlebit2_kernels.littlebit_linear`.
        activation: likewise.
        completeness: of the model's files, checked with the first module.
    """

    def __init__(
        self, parts: Sequence[Part], backend: str, activation: str, completeness: Completeness
    ) -> None:
        self.parts = list(parts)
        self.settings: dict[str, Any] = {"backend": backend, "activation": activation}
        self.completeness = completeness
        self.placeholders: Placeholders | None = None

    def placement(self, layer: Any, names: Sequence[str], sizes: Sequence[int]) -> Placement:
        """This rank's part of a module.

        Args:
            layer: the module.
            names: of its packed layers.
            sizes: outputs of this rank, for each output that the module holds side by side.

        Raises:
            ValueError: how the module is divided among ranks is not known.
        """
        raise NotImplementedError

    def takes_over_sum(self, layer: Any) -> bool:
        """Whether latents are summed over the ranks here; the module then leaves out its own sum."""
        return False

    def sum_over_ranks(self, latents: torch.Tensor) -> torch.Tensor:
        """Add up the latents of all ranks."""
        raise NotImplementedError

    def download_folder(self) -> str | None:
        """Where the server downloads models to, ``None`` for the Hub's default."""
        return None

    def create_weights(
        self,
        layer: torch.nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        """Register placeholders for the tensors of the packed layers, which collect what is loaded."""
        self.sizes = tuple(output_partition_sizes)
        self.placeholders = Placeholders(layer, self.parts)
        self.params_dtype = params_dtype

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Build this rank's part of the layers, checked and complete, in place of the placeholders.

        Raises:
            CheckpointError: a tensor is missing, unexpected or malformed; the message names it.
            ValueError: the layers are not those of the module, or cannot be divided among the ranks.
        """
        device, packed = self._take()
        self._check_biases(layer, packed)
        placement = self.placement(layer, [part.name for part in self.parts], self.sizes)
        placement.check(packed)
        if placement.by_columns:
            layer.packed = self._by_columns(layer, placement, packed[0], device)
        else:
            own = placement.rows(packed)
            _keep_bias(layer, own)
            # Where the caller adds the bias, it has it from the layer.
            own = [PackedLinear(part.paths) for part in own] if layer.skip_bias_add else own
            layer.packed = JoinedLinear([part.to(device) for part in own], **self.settings)
        if device.type != "cpu":
            warmup(layer.packed, self.params_dtype)

    def _take(self) -> tuple[torch.device, list[PackedLinear]]:
        if self.placeholders is None:
            raise RuntimeError(f"{self.parts[0].name}: packed layers cannot be loaded a second time")
        self.completeness.check(self.download_folder())
        device = self.placeholders.device
        packed = self.placeholders.take()
        self.placeholders = None
        return device, packed

    def _check_biases(self, layer: Any, packed: Sequence[PackedLinear]) -> None:
        for part, one in zip(self.parts, packed, strict=True):
            if getattr(layer, "bias", None) is not None and one.bias is None:
                raise CheckpointError(f"{part.structure.stored}.bias is missing: the model has a bias there")

    def _by_columns(
        self, layer: Any, placement: Placement, packed: PackedLinear, device: torch.device
    ) -> JoinedLinear | StagedLinear:
        _keep_bias(layer, [packed])
        part = placement.columns(packed)
        if layer.skip_bias_add:
            part = PackedLinear(part.paths)
        part = part.to(device)
        if part.ranks is not None and self.takes_over_sum(layer):
            latents = sum(part.shape.own_rows) * _LATENT_BYTES
            if latents < part.out_features * self.params_dtype.itemsize:
                # The sum over ranks is taken between the stages, so the module must not sum again.
                layer.reduce_results = False
                return StagedLinear(part, **self.settings)
        # The bias enters a sum over ranks once.
        return JoinedLinear([part if placement.rank == 0 else PackedLinear(part.paths)], **self.settings)

    def apply(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Map ``x`` ``[..., K]`` to ``[..., N]``; ``bias`` is not read, because the packed layers hold it."""
        packed: Any = layer.packed
        if isinstance(packed, StagedLinear):
            return packed.outputs(self.sum_over_ranks(packed.latents(x)), x.dtype)
        return packed(x)


def _keep_bias(layer: Any, parts: Sequence[PackedLinear]) -> None:
    """Give the module's own bias its values, for callers that add it themselves."""
    if getattr(layer, "bias", None) is None:
        return
    with torch.no_grad():
        layer.bias.copy_(torch.cat([part.bias for part in parts if part.bias is not None]))
