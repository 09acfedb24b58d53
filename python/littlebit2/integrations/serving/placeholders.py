"""Stand-ins for the tensors of packed layers, which keep what a server's loader brings."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import Parameter

from littlebit2.checkpoint import CheckpointError
from littlebit2_kernels import PackedLinear, packed_from_state
from littlebit2_kernels.state import path_suffix

from .layers import Part

__all__ = ["Placeholders"]

#: Stored tensors of a path by name, and what a stand-in holds in place of values.
_TENSORS = {
    "V_packed": torch.int32,
    "V_shape": torch.int64,
    "V_shared": torch.int64,
    "U_packed": torch.int32,
    "U_shape": torch.int64,
    "v2": torch.float32,
    "latent_scale": torch.float32,
    "u1": torch.float32,
}


class Placeholders:
    """Collects the tensors of the layers that a module is made of.

    A server's loader gives each tensor to the parameter of its name, together with which part of a fused
    module it belongs to. So the module gets one empty parameter for each name that any part has.

    Args:
        layer: the module, before it makes its bias.
        parts: its layers.
    """

    def __init__(self, layer: Any, parts: Sequence[Part]) -> None:
        self.layer = layer
        self.parts = list(parts)
        self.tensors: list[dict[str, torch.Tensor]] = [{} for _ in parts]
        self.names: list[str] = []
        for path in range(max(part.structure.num_paths for part in parts)):
            for name, dtype in _TENSORS.items():
                full = name + path_suffix(path)
                parameter = Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
                parameter.weight_loader = functools.partial(self._load, full)  # type: ignore[attr-defined]
                layer.register_parameter(full, parameter)
                self.names.append(full)
        # The module makes its bias in the dtype of the activations, and loads it by this attribute.
        layer.weight_loader = functools.partial(self._load, "bias")

    @property
    def device(self) -> torch.device:
        """Where the module is made."""
        return getattr(self.layer, self.names[0]).device

    def _load(self, name: str, parameter: Parameter, tensor: torch.Tensor, shard: Any = None) -> None:
        if parameter is self.layer:  # what vLLM hands over for a name that the module does not have
            names = ", ".join(part.structure.stored for part in self.parts)
            raise CheckpointError(f"{names}: a tensor is stored that a packed layer does not have")
        tensors = self.tensors[self._index(shard, name)]
        if name in tensors:
            raise CheckpointError(f"{self.parts[self._index(shard, name)].name}.{name} is stored twice")
        tensors[name] = tensor.detach().to("cpu", copy=True)

    def _index(self, shard: Any, name: str) -> int:
        index = "qkv".find(shard) if isinstance(shard, str) and len(shard) == 1 else shard
        if index is None and len(self.parts) == 1:
            return 0
        if isinstance(index, int) and not isinstance(index, bool) and 0 <= index < len(self.parts):
            return index
        names = ", ".join(part.name for part in self.parts)
        raise CheckpointError(f"{name} of part {shard!r} was loaded into a module made of {names}")

    def take(self) -> list[PackedLinear]:
        """Return the layers, checked, and remove the stand-ins.

        Raises:
            CheckpointError: a tensor is missing, unexpected or malformed, or ranks are not those of
                config.json; the message names it.
        """
        packed = [self._build(part, tensors) for part, tensors in zip(self.parts, self.tensors, strict=True)]
        for name in self.names:
            delattr(self.layer, name)
        del self.layer.weight_loader  # the class has its own
        self.tensors = []
        return packed

    def _build(self, part: Part, tensors: dict[str, torch.Tensor]) -> PackedLinear:
        stored = part.structure.stored
        try:
            packed = packed_from_state(
                {f"{stored}.{name}": one for name, one in tensors.items()}, f"{stored}."
            )
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(str(error.args[0])) from error
        shares = part.structure.shares or tuple(range(packed.shape.num_paths))
        for what, expected, got in (
            ("ranks", part.structure.ranks, packed.ranks),
            ("shares", shares, packed.shares),
        ):
            if expected != got:
                raise CheckpointError(f"{stored}: {what} must be {expected}, as the config says, got {got}")
        return packed
