"""The quantizer by which transformers builds a model of packed layers and loads it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.base import HfQuantizer

from littlebit2.architecture.projections import fuse_projections
from littlebit2.checkpoint import Checkpoint, CheckpointError, LayerSpec, open_checkpoint, quantization_config
from littlebit2_kernels import LittleBitLinear, packed_from_state

from .configuration import METHOD, LittleBit2Config
from .modules import FusedLinear, PendingLinear, Placement, find_places, fused_parents, layers_of, spec_of

__all__ = ["LittleBit2Quantizer", "attach"]


class LittleBit2Quantizer(HfQuantizer):
    """Replaces the ``nn.Linear`` modules of a model by packed layers and sees that these are loaded.

    Two ways lead there. Our layout goes the library's own way: layers on the meta device whose buffers
    have the names of the file, filled like any other tensor. Other layouts (and ours on request) have
    placeholders without tensors; once the library has loaded everything else, each layer is read, checked,
    brought to the kernels' layout where that is wanted, and put in its place, one at a time.
    """

    # Dense checkpoints are refused with the library's own message: quantise them first.
    requires_calibration = True
    quantization_config: LittleBit2Config

    def __init__(self, quantization_config: LittleBit2Config, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._checkpoint: Checkpoint | None = None
        self._places: list[Placement] = []
        self._shapes: dict[str, torch.Size] = {}

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Raise ``ValueError`` for a device map that offloads to disk."""
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise ValueError(
                'device_map must not place modules on "disk": packed layers are small, keep them'
            )

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> PreTrainedModel:
        config = self.quantization_config
        checkpoint = open_checkpoint(Path(checkpoint_files[0]).parent) if checkpoint_files else None
        if checkpoint is None:
            layers = _specs_from_config(model, config)
        else:
            layers = dict(checkpoint.layers)
            absent = sorted(set(config.layer_names) - set(layers))
            if absent:
                raise CheckpointError(
                    f"{checkpoint.path}: quantization_config names layers that have no tensors: "
                    f"{', '.join(absent)}"
                )
        prefix = model.base_model_prefix
        self._places = find_places(model, layers, prefix)
        if checkpoint is not None and (config.stream or not _in_our_names(checkpoint)):
            self._checkpoint = checkpoint
            _ignore_layers(model, self._places)
        elif checkpoint is not None:
            checkpoint.close()
        for place in self._places:
            pending = self._checkpoint is not None
            module = PendingLinear(place.spec) if pending else config.make_layer(place.spec, "meta")
            model.set_submodule(place.module, module)
        for name, (parent, names) in fused_parents(self._places).items():
            model.set_submodule(name, FusedLinear(model.get_submodule(parent), names))
        self._shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        places, self._places = self._places, []
        checkpoint, self._checkpoint = self._checkpoint, None
        shapes, self._shapes = self._shapes, {}
        _check_shapes(model, shapes)
        if checkpoint is not None:
            with checkpoint:
                self._read_layers(model, checkpoint, places)
        for place in places:
            layer = model.get_submodule(place.module)
            assert isinstance(layer, LittleBitLinear)
            if checkpoint is None:
                _check_loaded(place.module, layer)
                self._prepack(layer)
        self._update_config(model)
        if self.quantization_config.fuse:
            fuse_projections(model)
        return model

    def _read_layers(self, model: PreTrainedModel, checkpoint: Checkpoint, places: list[Placement]) -> None:
        config = self.quantization_config
        devices = set(getattr(model, "hf_device_map", {}).values())
        if len(devices) > 1:
            raise ValueError(
                f"device_map must name one device for a checkpoint in the {checkpoint.format} layout, got "
                f"{len(devices)}; convert it first: littlebit2 convert"
            )
        for place in places:
            packed = checkpoint.load_layer(place.spec.name).to(model.device)
            layer = LittleBitLinear.from_packed(packed, backend=config.backend, activation=config.activation)
            self._prepack(layer)
            layer.eval()
            model.set_submodule(place.module, layer)
        for name, (parent, _) in fused_parents(places).items():
            fused = model.get_submodule(name)
            assert isinstance(fused, FusedLinear)
            fused.relink(model.get_submodule(parent))

    def _prepack(self, layer: LittleBitLinear) -> None:
        config = self.quantization_config
        on_cpu = layer.u1.device.type == "cpu"
        if on_cpu and config.prepack and config.backend in ("auto", "cpu"):
            layer.prepack_()

    def _update_config(self, model: PreTrainedModel) -> None:
        """Let the stored configuration name the layers as this model does."""
        own = quantization_config(
            [spec_of(name, layer) for name, layer in layers_of(model).items()],
            [name for name, module in model.named_modules() if type(module) is nn.Linear],
        )
        config = self.quantization_config
        for key in ("ranks", "single_stage", "shares", "modules_to_not_convert"):
            setattr(config, key, own.get(key) or type(getattr(config, key))())

    def get_state_dict_and_metadata(
        self, model: PreTrainedModel, *args: Any, **kwargs: Any
    ) -> tuple[None, dict[str, str]]:
        """Bring the configuration up to date with the model that is saved, and repeat it in the file."""
        self._update_config(model)
        stored = self.quantization_config
        return None, {"quant_method": METHOD, "format_version": str(stored.format_version)}

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Whether ``save_pretrained`` works: yes, it writes our layout."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether adapters can be trained on top: yes. The packed weights themselves stay as they are."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Whether ``generate`` may compile its decode step: yes."""
        return True


def attach(model: Any) -> None:
    """Make ``save_pretrained`` work for a model whose linears were quantised in memory.

    ``littlebit2.quantize.quantize_linears`` knows nothing of transformers, so a model that it changed would
    be saved without the entry that tells ``from_pretrained`` what the tensors are.

    Args:
        model: a ``PreTrainedModel``, changed in place.

    Raises:
        ValueError: the model has no packed layer.
    """
    layers = layers_of(model)
    if not layers:
        raise ValueError("model must hold at least one LittleBitLinear, got none")
    config = LittleBit2Config.from_layers({name: spec_of(name, layer) for name, layer in layers.items()})
    quantizer = LittleBit2Quantizer(config)
    quantizer._update_config(model)
    model.hf_quantizer = quantizer
    model.is_quantized = True
    model.quantization_method = METHOD
    model.config.quantization_config = config


def _ignore_layers(model: PreTrainedModel, places: list[Placement]) -> None:
    """Keep the library from reporting the tensors of layers that are read later as unexpected."""
    names = {name for place in places for name in (place.spec.name, place.module)}
    known = set(model._keys_to_ignore_on_load_unexpected or ())
    # On the instance: the attribute of the class is shared by every model.
    model._keys_to_ignore_on_load_unexpected = known | {rf"^{re.escape(name)}\." for name in names}


def _in_our_names(checkpoint: Checkpoint) -> bool:
    """Whether the tensors in the files are, name by name, the buffers of our layers."""
    layouts = {layer.layout for layer in checkpoint.stored.values()}
    return checkpoint.format == METHOD and layouts <= {METHOD, "onebit"}


def _specs_from_config(model: PreTrainedModel, config: LittleBit2Config) -> dict[str, LayerSpec]:
    """Describe the layers where there is no file to look at: the dense model gives the sizes."""
    modules = dict(model.named_modules())
    specs = {}
    for name in config.layer_names:
        linear = modules.get(name)
        if not isinstance(linear, nn.Linear):
            raise CheckpointError(
                f"quantization_config names {name}, expected an nn.Linear of the model there"
            )
        ranks = tuple(config.ranks[name]) if name in config.ranks else None
        shares = config.shares.get(name) or range(len(ranks or (0,)))
        specs[name] = LayerSpec(
            name, linear.in_features, linear.out_features, ranks, tuple(shares), linear.bias is not None
        )
    return specs


def _check_shapes(model: PreTrainedModel, expected: dict[str, torch.Size]) -> None:
    # Some versions of the library put tensors of any shape into a model that has a quantizer.
    wrong = [
        f"{name} must have shape {list(expected[name])}, got {list(tensor.shape)}"
        for name, tensor in model.state_dict().items()
        if name in expected and tensor.shape != expected[name]
    ]
    if wrong:
        raise CheckpointError(f"mis-shaped tensors: {', '.join(wrong)}")


def _check_loaded(name: str, layer: LittleBitLinear) -> None:
    """Raise unless the buffers of a layer, which were set one by one, make a layer of its structure."""
    buffers = {
        key: value for key, value in layer.named_buffers(recurse=False) if isinstance(value, torch.Tensor)
    }
    try:
        packed = packed_from_state(buffers)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"layer {name} was not loaded whole: {error.args[0]}") from error
    ranks = None if packed.single_stage else packed.ranks
    if (packed.in_features, packed.out_features, ranks) != (
        layer.in_features,
        layer.out_features,
        layer.ranks,
    ):
        raise CheckpointError(
            f"layer {name}: (in_features, out_features, ranks) must be "
            f"{(layer.in_features, layer.out_features, layer.ranks)}, "
            f"got {(packed.in_features, packed.out_features, ranks)}"
        )
