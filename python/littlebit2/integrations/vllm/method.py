"""The methods of vLLM's modules: which part of a layer a rank has, and who sums."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from vllm.config import get_current_vllm_config_or_none
from vllm.distributed import tensor_model_parallel_all_reduce
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearMethodBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

from littlebit2.integrations.serving.linear import PackedLinearBase
from littlebit2.integrations.serving.placement import Placement
from littlebit2.integrations.serving.vocabulary import Int8RowsBase, PackedHeadBase

__all__ = ["Int8RowsMethod", "PackedHeadMethod", "PackedLinearMethod", "TiedHeadMethod"]

#: Modules whose division is known. Others divide in ways of their own.
_DIVIDED = (ColumnParallelLinear, MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear)


class PackedLinearMethod(PackedLinearBase, LinearMethodBase):
    """See :class:`PackedLinearBase`."""

    def create_weights(self, layer: Any, *sizes: Any, **more: Any) -> None:
        """Register placeholders for the tensors of the packed layers, which collect what is loaded."""
        super().create_weights(layer, *sizes, **more)
        self.adapters = _with_adapters()

    def placement(self, layer: Any, names: Sequence[str], sizes: Sequence[int]) -> Placement:
        """See :class:`PackedLinearBase`."""
        if isinstance(layer, ReplicatedLinear) or layer.tp_size == 1:
            return Placement.whole(names, layer.input_size, sizes)
        if type(layer) not in _DIVIDED:
            raise ValueError(
                f"{names[0]}: {type(layer).__name__} cannot be divided among {layer.tp_size} ranks: "
                "serve the model without tensor parallelism"
            )
        rank, ranks = layer.tp_rank, layer.tp_size
        if isinstance(layer, RowParallelLinear):
            return Placement.by_inputs(names, layer.input_size, sizes, rank, ranks)
        pieces = [(rank, ranks)] * len(sizes)
        if isinstance(layer, QKVParallelLinear):
            replicas = layer.num_kv_head_replicas
            pieces[1:] = [(rank // replicas, ranks // replicas)] * (len(sizes) - 1)
        return Placement(tuple(names), rank, ranks, layer.input_size, tuple(sizes), tuple(pieces))

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """See :class:`PackedLinearBase`."""
        device = self.placeholders.device if self.placeholders is not None else None
        super().process_weights_after_loading(layer)
        if self.adapters:
            # vLLM takes the device of adapters from an attribute of this name.
            layer.weight_packed = torch.empty(0, device=device)

    def download_folder(self) -> str | None:
        """See :class:`PackedLinearBase`."""
        config = get_current_vllm_config_or_none()
        return None if config is None else config.load_config.download_dir

    def takes_over_sum(self, layer: Any) -> bool:
        """Adapters are added before the sum of the module, so that one must stay where there are any."""
        return bool(layer.reduce_results) and not self.adapters

    def sum_over_ranks(self, latents: torch.Tensor) -> torch.Tensor:
        """See :class:`PackedLinearBase`."""
        return tensor_model_parallel_all_reduce(latents)


class PackedHeadMethod(PackedHeadBase, QuantizeMethodBase):
    """See :class:`PackedHeadBase`."""

    def create_weights(self, layer: Any, *sizes: Any, **more: Any) -> None:
        """See :class:`PackedHeadBase`.

        Raises:
            ValueError: the server is to add LoRA adapters.
        """
        _refuse_adapters(self.parts[0].name, "a packed head")
        super().create_weights(layer, *sizes, **more)


class Int8RowsMethod(Int8RowsBase, QuantizeMethodBase):
    """See :class:`Int8RowsBase`."""

    def create_weights(self, layer: Any, *sizes: Any, **more: Any) -> None:
        """See :class:`Int8RowsBase`.

        Raises:
            ValueError: the server is to add LoRA adapters.
        """
        _refuse_adapters(self.name, "int8 rows")
        super().create_weights(layer, *sizes, **more)


class TiedHeadMethod(QuantizeMethodBase):
    """A head that is the embedding in int8 rows: the model ties it, and uses the embedding in its place."""

    def __init__(self, name: str) -> None:
        self.name = name

    def create_weights(self, layer: Any, *sizes: Any, **more: Any) -> None:
        """Make nothing: the embedding has the rows."""

    def tie_weights(self, layer: torch.nn.Module, embed_tokens: torch.nn.Module) -> torch.nn.Module:
        """Return the embedding, which computes logits too."""
        return embed_tokens

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        """Raise ``ValueError``: a model that ties its head does not have this one when it is loaded."""
        raise ValueError(f"{self.name}: config.json ties the head to the embedding, vLLM's model does not")

    def apply(self, layer: torch.nn.Module, *inputs: Any, **more: Any) -> torch.Tensor:
        """Raise ``RuntimeError``: see :meth:`process_weights_after_loading`."""
        raise RuntimeError(f"{self.name}: the head is tied to the embedding, which computes the logits")


def _with_adapters() -> bool:
    config = get_current_vllm_config_or_none()
    return config is not None and config.lora_config is not None


def _refuse_adapters(name: str, what: str) -> None:
    if _with_adapters():
        raise ValueError(f"{name}: LoRA adapters beside {what} are not served: start without --enable-lora")
