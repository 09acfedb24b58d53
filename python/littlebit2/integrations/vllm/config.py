"""The ``quantization_config`` of our checkpoints, as vLLM wants it."""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from littlebit2.integrations.serving.config import METHOD, PackedConfigBase

__all__ = ["METHOD", "PackedConfig"]


class PackedConfig(PackedConfigBase, QuantizationConfig):
    """See :class:`PackedConfigBase`."""

    #: Whether the head of the model is the embedding.
    tied = False

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None
    ) -> None:
        """Check the headers of a local checkpoint before anything is built, those of the Hub later.

        Raises:
            CheckpointError: a tensor is missing, unexpected or mis-shaped; the message names it.
        """
        self.tied = bool(getattr(hf_config, "tie_word_embeddings", False))
        self.completeness.expect(model_name, revision)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Bring the names of layers to those of vLLM's modules."""
        self.rename(hf_to_vllm_mapper)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        """Return the method of a layer: ours if it is packed, that of a dense layer, or vLLM's default.

        Raises:
            ValueError: what is packed under this name cannot be served.
        """
        # Not before a model is built: these import most of vLLM.
        from vllm.model_executor.layers.fused_moe import RoutedExperts  # noqa: PLC0415
        from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod  # noqa: PLC0415
        from vllm.model_executor.layers.vocab_parallel_embedding import (  # noqa: PLC0415
            ParallelLMHead,
            VocabParallelEmbedding,
        )

        from .method import Int8RowsMethod, PackedHeadMethod, PackedLinearMethod, TiedHeadMethod  # noqa: PLC0415

        if isinstance(layer, LinearBase):
            parts = self.linear_parts(prefix)
            return UnquantizedLinearMethod() if parts is None else PackedLinearMethod(parts, *self.settings)
        if isinstance(layer, VocabParallelEmbedding):
            # vLLM's models give the embedding no name.
            rows = self.layers.rows_at(prefix, None if isinstance(layer, ParallelLMHead) else "")
            if rows is not None:
                return Int8RowsMethod(rows)
        if isinstance(layer, ParallelLMHead):
            parts = self.linear_parts(prefix)
            if parts is not None:
                return PackedHeadMethod(parts, *self.settings)
            return TiedHeadMethod(prefix) if self.tied and self.layers.rows else None
        self.refuse_other(layer, prefix, isinstance(layer, RoutedExperts))
        return None
