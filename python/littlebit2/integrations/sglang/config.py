"""The ``quantization_config`` of our checkpoints, as SGLang wants it."""

from __future__ import annotations

from typing import Any, Self

import torch
from sglang.srt.layers.quantization.base_config import QuantizationConfig

from littlebit2.integrations.serving.config import METHOD, PackedConfigBase

__all__ = ["METHOD", "PackedConfig"]

#: What SGLang adds to the configuration of a checkpoint.
_ADDED = ("packed_modules_mapping", "hf_config")


class PackedConfig(PackedConfigBase, QuantizationConfig):
    """See :class:`PackedConfigBase`."""

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Make the configuration from the ``quantization_config`` of config.json, and check the files.

        Raises:
            ValueError: the format is newer than this package, or an entry is unknown or malformed.
            CheckpointError: a tensor is missing, unexpected or mis-shaped; the message names it.
        """
        made = super().from_config({name: value for name, value in config.items() if name not in _ADDED})
        made.packed_modules_mapping = dict(config.get("packed_modules_mapping") or {})
        # The only thing that says where the checkpoint is, and which commit of the Hub's it is.
        model = getattr(config.get("hf_config"), "_name_or_path", None)
        if model:
            made.completeness.expect(model, getattr(config["hf_config"], "_commit_hash", None))
        return made

    def get_scaled_act_names(self) -> list[str]:
        """Activation functions with scales: none."""
        return []

    def apply_weight_name_mapper(self, hf_to_sglang_mapper: Any) -> None:
        """Bring the names of layers to those of SGLang's modules."""
        self.rename(hf_to_sglang_mapper)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        """Return the method of a layer: ours if it is packed, that of a dense layer, or SGLang's default.

        Raises:
            ValueError: what is packed under this name cannot be served.
        """
        # Not before a model is built: these import most of SGLang.
        from sglang.srt.layers.linear import LinearBase  # noqa: PLC0415
        from sglang.srt.layers.moe.fused_moe_triton import FusedMoE  # noqa: PLC0415
        from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod  # noqa: PLC0415
        from sglang.srt.layers.vocab_parallel_embedding import (  # noqa: PLC0415
            ParallelLMHead,
            VocabParallelEmbedding,
        )

        from .method import Int8RowsMethod, PackedHeadMethod, PackedLinearMethod  # noqa: PLC0415

        if isinstance(layer, LinearBase):
            parts = self.linear_parts(prefix)
            return UnquantizedLinearMethod() if parts is None else PackedLinearMethod(parts, *self.settings)
        if isinstance(layer, VocabParallelEmbedding):
            rows = self.layers.rows_at(prefix, None if isinstance(layer, ParallelLMHead) else "")
            if rows is not None:
                return Int8RowsMethod(rows)
        if isinstance(layer, ParallelLMHead):
            parts = self.linear_parts(prefix)
            return None if parts is None else PackedHeadMethod(parts, *self.settings)
        self.refuse_other(layer, prefix, isinstance(layer, FusedMoE))
        return None
