"""The ``quantization_config`` of our checkpoints, as vLLM wants it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from littlebit2.integrations.configuration import METHOD, LittleBit2Config
from littlebit2_kernels.ops.operands import ACTIVATION_DTYPES

from .layers import LayerTable

__all__ = ["METHOD", "PackedConfig"]

#: Least compute capability of the CUDA kernels, as vLLM writes it.
_LEAST_CAPABILITY = 80


class PackedConfig(QuantizationConfig):
    """Says which linear layers of a model are packed, and refuses what cannot be served.

    Args:
        stored: the configuration of the checkpoint; its ``backend`` and ``activation`` apply to every layer.
    """

    def __init__(self, stored: LittleBit2Config) -> None:
        super().__init__()
        self.stored = stored
        self.layers = LayerTable.from_config(stored)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self.layers.structures)} packed layers)"

    def get_name(self) -> str:
        """The method that config.json names."""
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Dtypes of activations."""
        return list(ACTIVATION_DTYPES)

    @classmethod
    def get_min_capability(cls) -> int:
        """Least compute capability of a GPU."""
        return _LEAST_CAPABILITY

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Files beside config.json: none."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> PackedConfig:
        """Make the configuration from the ``quantization_config`` of config.json.

        Raises:
            ValueError: the format is newer than this package, or an entry is unknown or malformed.
        """
        return cls(LittleBit2Config(**config))

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None
    ) -> None:
        """Check the headers of a local checkpoint before anything is built.

        Raises:
            CheckpointError: a tensor is missing, unexpected or mis-shaped; the message names it.
        """
        if Path(model_name).is_dir():
            from .completeness import check_directory  # noqa: PLC0415  # builds a model of transformers

            check_directory(Path(model_name))

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Bring the names of layers to those of vLLM's modules."""
        self.layers = self.layers.renamed(hf_to_vllm_mapper.apply_dict)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        """Return the method of a layer: ours if it is packed, that of a dense layer, or vLLM's default.

        Raises:
            ValueError: what is packed under this name cannot be served.
        """
        # Not before a model is built: these import most of vLLM.
        from vllm.model_executor.layers.fused_moe import RoutedExperts  # noqa: PLC0415
        from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod  # noqa: PLC0415

        from .method import PackedLinearMethod  # noqa: PLC0415

        if isinstance(layer, LinearBase):
            parts = self.layers.parts(prefix, self._mapping)
            if parts is None:
                return UnquantizedLinearMethod()
            return PackedLinearMethod(parts, self.stored.backend, self.stored.activation)
        if isinstance(layer, RoutedExperts):
            self.layers.refuse_experts("packed experts are not served yet: quantize without them")
        else:
            self.layers.refuse_at(
                prefix, f"a packed {type(layer).__name__} is not served: keep heads and embeddings dense"
            )
        return None

    @property
    def _mapping(self) -> Mapping[str, list[str]]:
        return self.packed_modules_mapping
