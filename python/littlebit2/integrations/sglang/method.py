"""The methods of SGLang's modules: which part of a layer a rank has.

Outputs are summed over the ranks by SGLang, not latents by us: whether a module sums at all is decided by its
callers, from call to call (``skip_all_reduce``, fused norms, attention that is divided by requests).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sglang.srt.distributed.utils import get_group_rank_size
from sglang.srt.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from sglang.srt.layers.quantization.base_config import LinearMethodBase, QuantizeMethodBase
from sglang.srt.runtime_context import get_server_args

from littlebit2.integrations.serving.linear import PackedLinearBase
from littlebit2.integrations.serving.placement import Placement
from littlebit2.integrations.serving.vocabulary import Int8RowsBase, PackedHeadBase

__all__ = ["Int8RowsMethod", "PackedHeadMethod", "PackedLinearMethod"]

#: Modules whose division is known. Others divide in ways of their own.
_DIVIDED = (ColumnParallelLinear, MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear)


class PackedLinearMethod(PackedLinearBase, LinearMethodBase):
    """See :class:`PackedLinearBase`."""

    def create_weights(self, layer: Any, *sizes: Any, **more: Any) -> None:
        """Register placeholders for the tensors of the packed layers, which collect what is loaded.

        Raises:
            ValueError: the server is to add LoRA adapters.
        """
        _refuse_adapters(self.parts[0].name)
        super().create_weights(layer, *sizes, **more)

    def placement(self, layer: Any, names: Sequence[str], sizes: Sequence[int]) -> Placement:
        """See :class:`PackedLinearBase`."""
        rank, ranks = get_group_rank_size(layer.tp_group)
        key_value = get_group_rank_size(getattr(layer, "kv_tp_group", None))
        if isinstance(layer, ReplicatedLinear) or max(ranks, key_value[1]) == 1:
            return Placement.whole(names, layer.input_size, sizes)
        if type(layer) not in _DIVIDED or layer.use_presharded_weights:
            raise ValueError(
                f"{names[0]}: {type(layer).__name__} cannot be divided among {ranks} ranks: "
                "serve the model without tensor parallelism"
            )
        if isinstance(layer, RowParallelLinear):
            return Placement.by_inputs(names, layer.input_size, sizes, rank, ranks)
        pieces = [(rank, ranks)] * len(sizes)
        if isinstance(layer, QKVParallelLinear):
            replicas = layer.num_kv_head_replicas
            pieces[1:] = [(key_value[0] // replicas, key_value[1] // replicas)] * (len(sizes) - 1)
        return Placement(tuple(names), rank, ranks, layer.input_size, tuple(sizes), tuple(pieces))

    def download_folder(self) -> str | None:
        """See :class:`PackedLinearBase`."""
        return get_server_args().download_dir


class PackedHeadMethod(PackedHeadBase, QuantizeMethodBase):
    """See :class:`PackedHeadBase`."""

    def create_weights(self, layer: Any, *sizes: Any, **more: Any) -> None:
        """See :class:`PackedHeadBase`.

        Raises:
            ValueError: the server is to add LoRA adapters.
        """
        _refuse_adapters(self.parts[0].name)
        super().create_weights(layer, *sizes, **more)


class Int8RowsMethod(Int8RowsBase, QuantizeMethodBase):
    """See :class:`Int8RowsBase`."""

    def create_weights(self, layer: Any, *sizes: Any, **more: Any) -> None:
        """See :class:`Int8RowsBase`.

        Raises:
            ValueError: the server is to add LoRA adapters.
        """
        _refuse_adapters(self.name)
        super().create_weights(layer, *sizes, **more)


def _refuse_adapters(name: str) -> None:
    if get_server_args().enable_lora:
        raise ValueError(
            f"{name}: SGLang's LoRA adapters beside packed layers are not served: start without "
            "--enable-lora, or merge the adapter before quantization"
        )
