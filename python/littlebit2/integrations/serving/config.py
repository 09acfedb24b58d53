"""The ``quantization_config`` of our checkpoints, as servers of vLLM's kind want it."""

from __future__ import annotations

from typing import Any, Self

import torch

from littlebit2.integrations.configuration import METHOD, LittleBit2Config
from littlebit2_kernels.ops.operands import ACTIVATION_DTYPES

from .completeness import Completeness
from .layers import LayerTable, Part

__all__ = ["METHOD", "PackedConfigBase"]

#: Least compute capability of the CUDA kernels, as servers write it.
_LEAST_CAPABILITY = 80


class PackedConfigBase:
    """Says which linear layers of a model are packed, and refuses what cannot be served.

    The plugin of a server derives from this class and from the server's class of configurations.

    Args:
        stored: the configuration of the checkpoint; its ``backend`` and ``activation`` apply to every layer.
    """

    #: Last names of the parts of fused modules, by the last name of these.
    packed_modules_mapping: dict[str, list[str]]

    def __init__(self, stored: LittleBit2Config) -> None:
        super().__init__()
        self.stored = stored
        self.layers = LayerTable.from_config(stored)
        self.completeness = Completeness()

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
    def from_config(cls, config: dict[str, Any]) -> Self:
        """Make the configuration from the ``quantization_config`` of config.json.

        Raises:
            ValueError: the format is newer than this package, or an entry is unknown or malformed.
        """
        return cls(LittleBit2Config(**config))

    @property
    def settings(self) -> tuple[str, str, Completeness]:
        """What each packed module is given beside its layers."""
        return self.stored.backend, self.stored.activation, self.completeness

    def rename(self, mapper: Any) -> None:
        """Bring the names of layers to those of the server's modules."""
        self.layers = self.layers.renamed(mapper.apply_dict)

    def linear_parts(self, prefix: str) -> list[Part] | None:
        """The packed layers of a linear module, or ``None`` if it is dense."""
        return self.layers.parts(prefix, self.packed_modules_mapping)

    def refuse_other(self, layer: torch.nn.Module, prefix: str, experts: bool) -> None:
        """Raise ``ValueError`` if a module that is neither linear nor of the vocabulary is packed."""
        if experts:
            self.layers.refuse_experts("packed experts are not served yet: quantize without them")
        else:
            self.layers.refuse_at(prefix, f"a packed {type(layer).__name__} is not served")
