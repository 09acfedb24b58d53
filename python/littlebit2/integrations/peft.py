"""LoRA adapters of peft on frozen packed layers.

An adapter adds ``scaling * B A x`` beside a packed layer, whose signs stay as they are: gradients reach the
adapter and the layer's input. The sum cannot be merged: a packed layer has no dense weight to add to, and
quantizing the sum again would throw away what was trained. Merging is refused; the adapter is saved and
loaded by itself, as peft does. To train the packed signs instead, there is ``littlebit2 finetune``.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from littlebit2._messages import require
from littlebit2.architecture.salient import SalientLinear
from littlebit2_kernels import LittleBitLinear

require("peft")

from peft import LoraConfig  # noqa: E402  # said in our words where it is missing
from peft.tuners import tuners_utils  # noqa: E402
from peft.tuners.lora.layer import LoraLayer  # noqa: E402
from peft.utils import INCLUDE_LINEAR_LAYERS_SHORTHAND  # noqa: E402
from peft.utils.constants import SEQ_CLS_HEAD_NAMES  # noqa: E402

__all__ = ["LoraLittleBitLinear", "with_packed_layers"]

#: Layers that take adapters.
_PACKED = (LittleBitLinear, SalientLinear)
#: Options of a ``LoraConfig`` that need the dense weight of the layer, by the values that do not.
_PLAIN = {"use_dora": (False, None), "init_lora_weights": (True, False, "gaussian", "orthogonal")}

_REFUSED = (
    "a LoRA adapter cannot be merged into a packed layer, which has no dense weight to add it to: keep the "
    "adapter beside it (save_pretrained), or merge it into the dense model and quantize that"
)


def with_packed_layers(config: LoraConfig) -> LoraConfig:
    """Let ``config`` take packed layers as targets; returns it.

    ``target_modules="all-linear"`` means dense and packed linear layers alike, without the head, as in peft.
    The same is needed for loading an adapter: ``PeftModel.from_pretrained(model, folder,
    config=with_packed_layers(PeftConfig.from_pretrained(folder)))``.

    Args:
        config: for ``get_peft_model``; of plain LoRA.

    Raises:
        TypeError: it is no ``LoraConfig``.
        ValueError: it asks for something that needs the dense weight (DoRA, PiSSA, OLoRA, LoftQ, ...).
    """
    if not isinstance(config, LoraConfig):
        raise TypeError(f"config must be a peft.LoraConfig, got {type(config).__name__}")
    for name, allowed in _PLAIN.items():
        value = getattr(config, name, None)
        if value not in allowed:
            raise ValueError(
                f"{name} must be one of {', '.join(map(str, allowed))} on packed layers, which have no dense "
                f"weight, got {value!r}"
            )
    _resolve_all_linear()
    # peft's extension point for layers that it does not know.
    config._register_custom_module(dict.fromkeys(_PACKED, LoraLittleBitLinear))
    return config


def _resolve_all_linear() -> None:
    """Let peft count packed layers of a configuration that takes them as linear; further calls do nothing.

    peft looks for ``nn.Linear`` alone, and has no registry for what else is linear.
    """
    name = "_maybe_include_all_linear_layers"
    original = getattr(tuners_utils, name, None)
    if original is None or hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def resolve(peft_config: Any, model: nn.Module) -> Any:
        custom = getattr(peft_config, "_custom_modules", None) or {}
        targets = getattr(peft_config, "target_modules", None)
        all_linear = isinstance(targets, str) and targets.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND
        peft_config = original(peft_config, model)
        if all_linear and LittleBitLinear in custom:
            peft_config.target_modules = {*peft_config.target_modules, *_packed_targets(peft_config, model)}
        return peft_config

    setattr(tuners_utils, name, resolve)


def _packed_targets(config: Any, model: nn.Module) -> set[str]:
    """Names of the packed layers that are neither a head, by peft's rules, nor inside an adapter."""
    find: Any = getattr(model, "get_output_embeddings", None)
    head = None if find is None else find()
    if head is None and config.task_type == "SEQ_CLS":
        found = (getattr(model, name, None) for name in SEQ_CLS_HEAD_NAMES)
        head = next((module for module in found if module is not None), None)
    # The packed part of a layer with salient columns is inside that layer.
    inside = tuple(
        f"{name}."
        for name, module in model.named_modules()
        if isinstance(module, (tuners_utils.BaseTunerLayer, SalientLinear))
    )
    heads = set() if head is None else set(head.modules())
    return {
        name
        for name, module in model.named_modules()
        if isinstance(module, _PACKED) and module not in heads and not name.startswith(inside)
    }


class LoraLittleBitLinear(nn.Module, LoraLayer):
    """A packed layer with adapters beside it; made by peft, see :func:`with_packed_layers`."""

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: LoraConfig,
        r: int = 0,
        lora_alpha: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        LoraLayer.__init__(self, base_layer, **kwargs)
        # peft brings new adapters to the device of this attribute, or of a parameter, of which packed layers
        # have none. Plain, so that it is no part of the layer's state.
        base_layer.__dict__["qweight"] = torch.empty(0, device=_device_of(base_layer))
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        assert isinstance(module, _PACKED)
        return module.in_features, module.out_features

    def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter, on the device of the packed layer."""
        super().update_layer(adapter_name, *args, **kwargs)
        for adapters in (self.lora_A, self.lora_B):
            adapters[adapter_name].to(_device_of(self.get_base_layer()))

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Map ``x`` ``[..., K]`` to ``[..., N]``: the packed layer and every active adapter."""
        if kwargs.pop("adapter_names", None) is not None:
            raise ValueError(
                "adapter_names must be None: packed layers take the same adapters for a whole batch"
            )
        y: torch.Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return y
        for name in self.active_adapters:
            if name in self.lora_A:
                down, up = self.lora_A[name], self.lora_B[name]
                inner = self.lora_dropout[name](x).to(down.weight.dtype)
                y = y + (up(down(inner)) * self.scaling[name]).to(y.dtype)
        return y

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Raise ``ValueError``: there is nothing to merge into."""
        raise ValueError(_REFUSED)

    def unmerge(self) -> None:
        """Do nothing: nothing is ever merged."""

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """Return what an adapter adds to the weight, ``[N, K]``."""
        down: Any = self.lora_A[adapter]
        up: Any = self.lora_B[adapter]
        delta: torch.Tensor = up.weight @ down.weight * self.scaling[adapter]
        return delta

    def __repr__(self) -> str:
        return "lora." + super().__repr__()


def _device_of(layer: nn.Module) -> torch.device:
    return next(buffer.device for buffer in layer.buffers())
