"""The quantizer by which transformers builds a model of packed layers and loads it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_utils import remove_tied_weights_from_state_dict
from transformers.quantizers.base import HfQuantizer

from littlebit2.architecture.expansion import collapse, expand
from littlebit2.architecture.experts import LittleBitExperts
from littlebit2.architecture.places import Places
from littlebit2.architecture.projections import fuse_projections
from littlebit2.architecture.reads import modules_asked_for_dtype
from littlebit2.architecture.salient import SalientLinear
from littlebit2.architecture.typed import TypedLinear
from littlebit2.checkpoint import Checkpoint, CheckpointError, LayerSpec, open_checkpoint, quantization_config
from littlebit2.checkpoint.formats.layout import StoredLayer
from littlebit2.checkpoint.reader import int8_names
from littlebit2_kernels import LittleBitLinear, packed_from_state
from littlebit2_kernels.format import LayerShape

from .configuration import METHOD, STRUCTURE, LittleBit2Config
from .decoding.attention import choose as choose_attention
from .decoding.cache import grow_caches_of
from .heads import keep_rows_flat
from .int8 import check_scales, int8_names_of, place_rows
from .modules import (
    FusedLinear,
    PendingLinear,
    Placement,
    columns_of,
    find_places,
    fused_parents,
    initialized,
    layers_of,
    spec_of,
)
from .names import ConvertedAlready, FileNames, HiddenTensors, published_state

__all__ = ["LittleBit2Quantizer", "attach", "reusing"]


class LittleBit2Quantizer(HfQuantizer):
    """Replaces the ``nn.Linear`` modules of a model by packed layers and sees that these are loaded.

    Placeholders without tensors take the place of the modules, and the packed tensors are hidden from the
    library, whose conversions are made for dense weights. Once it has loaded everything else, each layer is
    read, checked, brought to the kernels' layout where that is wanted, and put in its place, one at a time.
    A model that is loaded from a state dict without files has layers on the meta device instead, whose
    buffers are filled like any other tensor.
    """

    # Dense checkpoints are refused with the library's own message: quantize them first.
    requires_calibration = True
    quantization_config: LittleBit2Config

    def __init__(self, quantization_config: LittleBit2Config, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._checkpoint: Checkpoint | None = None
        self._places: list[Placement] = []
        self._shapes: dict[str, torch.Size] = {}
        self._hidden: list[str] = []
        self._asked: set[str] = set()
        self._protected: list[tuple[nn.Module, list[str]]] = []
        self._choose_attention = False

    def update_attn_implementation(self, config: Any) -> Any:
        """Note whether the caller left the choice of the attention implementation open."""
        self._choose_attention = config._attn_implementation is None
        return config

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Raise ``ValueError`` for a device map that leaves modules without values in memory."""
        placed = {str(one) for one in (device_map.values() if isinstance(device_map, dict) else [device_map])}
        if "disk" in placed:
            raise ValueError(
                'device_map must not place modules on "disk": packed layers are small, keep them'
            )
        if "meta" in placed:
            raise ValueError(
                'device_map must not place modules on "meta": packed layers are read with values'
            )

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> PreTrainedModel:
        config = self.quantization_config
        checkpoint = _open(config.source, checkpoint_files)
        # Before anything is replaced: the conversions go by the parameters of the dense model.
        names = FileNames(model)
        replaced = expand(model)
        self._asked = modules_asked_for_dtype(model)
        columns: dict[str, str] = {}
        if checkpoint is None:
            layers = _specs_from_config(model, config)
            modules = {name: name for name in layers}
        else:
            layers = dict(checkpoint.layers)
            named = {*config.layer_names, *config.salient_columns, *config.int8}
            absent = sorted(named - {*layers, *checkpoint.columns, *checkpoint.int8})
            if absent:
                raise CheckpointError(
                    f"{checkpoint.path}: quantization_config names layers that have no tensors: "
                    f"{', '.join(absent)}"
                )
            columns = {one.layer: name for name, one in checkpoint.columns.items()}
            wholes = [columns.get(name, name) for name in layers]
            modules = names.modules(wholes, checkpoint.dense, model)
        self._places = find_places(model, layers, model.base_model_prefix, modules, columns)
        self._checkpoint = checkpoint
        if checkpoint is not None:
            self._hidden = [name for layer in checkpoint.stored.values() for name in _tensors_of(layer)]
            self._hidden += [
                entry.name for one in checkpoint.stored_columns.values() for entry in one.entries.values()
            ]
            known = set(model._keys_to_ignore_on_load_unexpected or ())
            # On the instance: the attribute of the class is shared by every model.
            model._keys_to_ignore_on_load_unexpected = known | {HiddenTensors.ignored}
        kept = Places(model)
        for place in self._places:
            pending = checkpoint is not None
            typed = place.module in self._asked
            module = PendingLinear(place.spec) if pending else config.make_layer(place.spec, "meta", typed)
            kept.put(place.module, module)
        if checkpoint is not None and checkpoint.int8:
            place_rows(model, checkpoint, names, kept)
        elif config.int8:
            raise CheckpointError(
                f"{config.int8[0]} has int8 rows, which are read from files only, got a state dict"
            )
        for name, (parent, parts) in fused_parents(self._places).items():
            kept.put(name, FusedLinear(model.get_submodule(parent), parts))
        collapse(model, replaced)
        self._protected = [
            *_protect_experts(model),
            *(() if checkpoint is not None else _protect_layers(model)),
        ]
        self._shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        return model

    def update_weight_conversions(self, weight_conversions: list[Any], *model: Any) -> list[Any]:
        """Hide the tensors of packed layers, before any pattern that is meant for dense ones sees them."""
        # Older versions of the library do not pass the model.
        conversions: list[Any] = super().update_weight_conversions(weight_conversions, *model)
        return [HiddenTensors(self._hidden), *conversions] if self._hidden else conversions

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        places, self._places = self._places, []
        checkpoint, self._checkpoint = self._checkpoint, None
        shapes, self._shapes = self._shapes, {}
        self._hidden = []
        for module, names in self._protected:
            for name in names:
                del module.__dict__[name]
        self._protected = []
        _check_shapes(model, shapes)
        check_scales(model)
        if checkpoint is not None:
            with nullcontext() if checkpoint is _opened.get() else checkpoint:
                self._read_layers(model, checkpoint, places)
        for place in places if checkpoint is None else ():
            layer = model.get_submodule(place.module)
            assert isinstance(layer, LittleBitLinear)
            _check_loaded(place.module, layer)
            self._prepack(layer)
            self._set_dtype(model, place.module, layer)
        self._update_config(model)
        keep_rows_flat(model)
        if self.quantization_config.fuse:
            fuse_projections(model)
        if model.device.type == "cpu":
            grow_caches_of(model)
            if self._choose_attention:
                choose_attention(model)
        return model

    def _read_layers(self, model: PreTrainedModel, checkpoint: Checkpoint, places: list[Placement]) -> None:
        config = self.quantization_config
        device_map = getattr(model, "hf_device_map", {})
        kept = Places(model)
        for place in places:
            device = _device_of(place.module, device_map, model)
            packed = checkpoint.load_layer(place.spec.name).to(device)
            kind = TypedLinear if place.module in self._asked else LittleBitLinear
            layer = kind.from_packed(packed, backend=config.backend, activation=config.activation)
            self._prepack(layer)
            layer.eval()
            module: nn.Module = layer
            if place.columns is not None:
                columns = checkpoint.load_columns(place.columns)
                # Dense values, of the dtype that dense tensors have.
                weight = columns.weight.to(device, model.dtype)
                module = SalientLinear(layer, columns.index.to(device), weight)
            hook = getattr(model.get_submodule(place.module), "_hf_hook", None)
            kept.put(place.module, module)
            self._set_dtype(model, place.module, layer)
            if hook is not None:
                from accelerate.hooks import add_hook_to_module  # noqa: PLC0415  # only dispatched models

                add_hook_to_module(module, hook)

    def _set_dtype(self, model: PreTrainedModel, name: str, layer: LittleBitLinear) -> None:
        """Let a layer that is asked for a dtype say the one that its dense weight would have."""
        if isinstance(layer, TypedLinear):
            kept: dict[str, torch.dtype] = model._get_dtype_plan(model.dtype)
            patterns = [(pattern.replace("*", r".*"), dtype) for pattern, dtype in kept.items()]
            found = [dtype for pattern, dtype in patterns if re.search(pattern, f"{name}.weight")]
            layer.weight_dtype = found[0] if found else model.dtype

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
            columns_of(model).values(),
            int8_names_of(model),
        )
        config = self.quantization_config
        for key in STRUCTURE:
            setattr(config, key, own.get(key) or type(getattr(config, key))())

    def get_state_dict_and_metadata(
        self, model: PreTrainedModel, *args: Any, **kwargs: Any
    ) -> tuple[dict[str, torch.Tensor] | None, dict[str, str]]:
        """Return what is saved: dense tensors under the names of published files, layers under their own.

        The library's way back to published names is made for dense weights and would mangle those of packed
        layers. So dense tensors go that way here, and the library is left nothing to do.
        """
        self._update_config(model)
        stored = self.quantization_config
        metadata = {"quant_method": METHOD, "format_version": str(stored.format_version)}
        if getattr(model, "_hf_peft_config_loaded", False):
            return None, metadata  # adapters alone are saved
        return _state_to_save(model), metadata

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
    """Make ``save_pretrained`` work for a model whose linears were quantized in memory.

    ``littlebit2.quantize_`` knows nothing of transformers, so a model that it changed would
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


def _state_to_save(model: Any) -> dict[str, torch.Tensor]:
    layers = {*layers_of(model), *columns_of(model)}
    rows = {full for name in int8_names_of(model) for full in int8_names(name)}
    packed: dict[str, torch.Tensor] = {}
    dense: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        # The bias of an int8 head is a dense tensor, which may be tied to another.
        (packed if name in rows or name.rpartition(".")[0] in layers else dense)[name] = tensor
    for name in model._keys_to_ignore_on_save or ():
        dense.pop(name, None)
    dense = remove_tied_weights_from_state_dict(dense, model)
    saved = {**published_state(model, dense), **packed}
    conversions = getattr(model, "_weight_conversions", None)
    if not isinstance(conversions, ConvertedAlready):
        model._weight_conversions = ConvertedAlready(conversions)
    return saved


def _tensors_of(layer: StoredLayer) -> list[str]:
    return [*(entry.name for entry in layer.tensors.values()), *layer.extras]


def _protect_experts(model: nn.Module) -> list[tuple[nn.Module, list[str]]]:
    """Give expanded experts the tensors that initializers look for; return what is to be removed again."""
    protected: list[tuple[nn.Module, list[str]]] = []
    for module in model.modules():
        if isinstance(module, LittleBitExperts):
            layout = module.layout
            names = [f"{name}{end}" for name in (layout.first, "down_proj") for end in ("", "_bias")]
            module.__dict__.update({name: initialized(layout.experts, 1, 1) for name in names})
            protected.append((module, names))
    return protected


def _protect_layers(model: nn.Module) -> list[tuple[nn.Module, list[str]]]:
    """Likewise for packed layers, which get the weight that a :class:`.PendingLinear` has."""
    layers = [layer for layer in layers_of(model).values() if not isinstance(layer, TypedLinear)]
    for layer in layers:
        layer.__dict__["weight"] = initialized(layer.out_features, layer.in_features)
    return [(layer, ["weight"]) for layer in layers]


def _device_of(name: str, device_map: Mapping[str, Any], model: PreTrainedModel) -> torch.device:
    """The device of a module: that of the closest module above it that the map names."""
    while name:
        if name in device_map:
            return torch.device(device_map[name])
        name = name.rpartition(".")[0]
    return torch.device(device_map[""]) if "" in device_map else model.device


#: The checkpoint that :func:`littlebit2.load` has open: its headers are read and kept once.
_opened: ContextVar[Checkpoint | None] = ContextVar("littlebit2_opened_checkpoint", default=None)


@contextmanager
def reusing(checkpoint: Checkpoint) -> Iterator[None]:
    """Let models that are loaded from the folder of ``checkpoint`` meanwhile read it through that."""
    token = _opened.set(checkpoint)
    try:
        yield
    finally:
        _opened.reset(token)


def _open(source: str | None, checkpoint_files: Sequence[str] | None) -> Checkpoint | None:
    if source is None and not checkpoint_files:
        return None
    folder = Path(source) if source is not None else Path((checkpoint_files or [""])[0]).parent
    opened = _opened.get()
    checkpoint = opened if opened is not None and opened.path == folder else open_checkpoint(folder)
    if source is None and checkpoint.files.renamed:
        if checkpoint is not opened:
            checkpoint.close()
        raise CheckpointError(
            f"{checkpoint.path}: its tensor names are not those of the model: use littlebit2.load, or "
            "convert it first (littlebit2 convert)"
        )
    asked = {Path(name).name for name in checkpoint_files or ()}
    read = {entry.file.name for entry in checkpoint.files.entries.values()}
    if source is None and not read <= asked:
        if checkpoint is not opened:
            checkpoint.close()
        raise CheckpointError(
            f"{checkpoint.path}: the weights that were asked for are in {', '.join(sorted(asked))}, but "
            f"packed layers would be read from {', '.join(sorted(read))}: keep one of them in the directory"
        )
    return checkpoint


def _specs_from_config(model: PreTrainedModel, config: LittleBit2Config) -> dict[str, LayerSpec]:
    """Describe the layers where there is no file to look at: the dense model gives the sizes."""
    modules = dict(model.named_modules())
    specs = {}
    for name in config.salient_columns:
        raise CheckpointError(
            f"layer {name} has salient columns, which are read from files only, got a state dict"
        )
    for name in config.layer_names:
        linear = modules.get(name)
        if not isinstance(linear, nn.Linear):
            raise CheckpointError(
                f"quantization_config names {name}, expected an nn.Linear of the model there"
            )
        ranks = tuple(config.ranks[name]) if name in config.ranks else None
        shares = tuple(config.shares.get(name, ()))
        try:
            shape = LayerShape(linear.in_features, linear.out_features, ranks, shares)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"quantization_config: layer {name}: {error}") from error
        specs[name] = LayerSpec(name, shape, linear.bias is not None)
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
    if packed.shape != layer.shape:
        raise CheckpointError(f"layer {name} must have the shape {layer.shape}, got {packed.shape}")
