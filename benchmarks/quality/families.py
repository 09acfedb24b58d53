"""Every model family of transformers: what quantizes, loads and computes the same as its dense model.

For each model class of the automatic mappings a tiny configuration is made by shrinking whatever sizes it
has. The model is saved, quantized from its files and in memory, loaded, saved and loaded again, and compared
with the dense model whose weights are those that the packed layers stand for.
"""

from __future__ import annotations

import contextlib
import copy
import io
import shutil
import signal
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

import littlebit2
from littlebit2.architecture.experts import collapse_experts, expand_experts
from littlebit2.quantize import QuantConfig
from littlebit2_kernels import LittleBitLinear

__all__ = ["FAILED", "Outcome", "model_classes", "sweep", "tiny_config", "try_class"]

#: Mappings of the library, in the order in which a class that is in several of them is taken.
MAPPINGS = (
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES",
    "MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES",
    "MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES",
    "MODEL_FOR_DEPTH_ESTIMATION_MAPPING_NAMES",
    "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES",
    "MODEL_FOR_CTC_MAPPING_NAMES",
    "MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "MODEL_MAPPING_NAMES",
)

#: Sizes of a tiny model by the name of the field, longest match first.
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "d_model": 64,
    "n_embd": 64,
    "embed_dim": 64,
    "dim": 64,
    "hidden_dim": 64,
    "model_dim": 64,
    "projection_dim": 64,
    "intermediate_size": 96,
    "ffn_dim": 96,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "d_ff": 96,
    "n_inner": 96,
    "ffn_hidden_size": 96,
    "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 48,
    "shared_intermediate_size": 48,
    "expert_ffn_hidden_size": 48,
    "num_hidden_layers": 2,
    "num_layers": 2,
    "n_layer": 2,
    "n_layers": 2,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "num_decoder_layers": 2,
    "num_encoder_layers": 2,
    "depth": 2,
    "num_attention_heads": 4,
    "num_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "d_kv": 16,
    "kv_channels": 16,
    "attention_head_size": 16,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "kv_lora_rank": 16,
    "q_lora_rank": 32,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "moe_topk": 2,
    "top_k_experts": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "vocab_size": 160,
    "max_position_embeddings": 64,
    "image_size": 32,
    "patch_size": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
_CUT = ("layer_types", "mlp_layer_types", "layers_block_type", "hybrid_override_pattern")

#: Weights of the largest model that is tried.
MOST_WEIGHTS = 30e6
#: Relative difference of outputs that counts as a failure.
FAR = 1e-3
QUANT = QuantConfig(ranks=(16,), method="joint-itq", itq_iterations=1)

#: Works; refused before any work; could not be built or run dense (the family was not tried); wrong.
WORKS, REFUSED, NOT_BUILT, FAILED = "works", "refused", "not built", "FAILED"


@dataclass
class Outcome:
    """What became of one model class.

    Attributes:
        model: name of the class.
        model_type: of its configuration.
        kind: one of ``works``, ``refused``, ``not built`` and ``FAILED``.
        reason: for anything but the first.
        packed: share of the parameters that is packed.
        compared: whether outputs were compared; ``False`` where no input for the class is known.
    """

    model: str
    model_type: str
    kind: str
    reason: str = ""
    packed: float = 0.0
    compared: bool = False


def model_classes() -> dict[str, str]:
    """Return every model type of the mappings with one model class: the first that a mapping names."""
    found: dict[str, str] = {}
    known = set(dir(transformers))  # asking for each class would import every model's code
    for mapping in MAPPINGS:
        for model_type, names in getattr(modeling_auto, mapping, {}).items():
            name = names if isinstance(names, str) else names[0]
            if name in known:
                found.setdefault(model_type, name)
    return found


def tiny_config(model_type: str) -> Any:
    """Return a configuration of ``model_type`` with small sizes, sub-configurations included."""
    kind = getattr(transformers, CONFIG_MAPPING_NAMES[model_type])
    config = kind()
    fields = _shrunk(config)
    for attempt in (fields, {k: v for k, v in fields.items() if not isinstance(v, list)}):
        try:
            return kind(**attempt)
        except Exception:  # the next, plainer attempt
            continue
    raise ValueError(f"no small configuration of {model_type} is accepted")


def _shrunk(config: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in config.to_dict().items():
        if name in ("model_type", "transformers_version", "architectures", "dtype", "id2label", "label2id"):
            continue
        sub = getattr(config, name, None)
        if isinstance(sub, transformers.PreTrainedConfig):
            fields[name] = {**_shrunk(sub), "model_type": sub.model_type}
        elif name in SIZES and isinstance(value, int) and not isinstance(value, bool):
            fields[name] = SIZES[name]
        elif name in _CUT and isinstance(value, (list, tuple)):
            fields[name] = _two_kinds(list(value))
    return fields


def _two_kinds(values: list[Any]) -> list[Any]:
    kinds = list(dict.fromkeys(map(str, values)))
    chosen = [next(v for v in values if str(v) == kind) for kind in kinds][:2]
    return (chosen * 2)[:2]


def inputs_of(model: Any) -> list[dict[str, torch.Tensor]]:
    """Return inputs to try on a model, most likely first."""
    config = model.config
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 100, (2, 7), generator=generator)
    size = getattr(config, "image_size", None) or getattr(
        getattr(config, "vision_config", None), "image_size", 32
    )
    size = size if isinstance(size, int) else 32
    channels = getattr(config, "num_channels", 3)
    channels = channels if isinstance(channels, int) else 3
    pixels = torch.randn(1, channels, size, size, generator=generator)
    text = {"input_ids": ids}
    both = {**text, "decoder_input_ids": ids}
    mels = getattr(config, "num_mel_bins", 80)
    mels = mels if isinstance(mels, int) else 80
    features = torch.randn(1, mels, 2 * getattr(config, "max_source_positions", 50), generator=generator)
    wave = torch.randn(1, 4000, generator=generator)
    sound = {"input_features": features, "decoder_input_ids": ids[:1]}
    main = getattr(model, "main_input_name", "input_ids")
    tries = {
        "input_ids": [text, both],
        "pixel_values": [{"pixel_values": pixels}, {"pixel_values": pixels, "input_ids": ids[:1]}],
        "input_values": [{"input_values": wave}, {"input_values": torch.randn(1, 1024, 128)}],
        "input_features": [sound, {"input_features": features}, {"input_features": features.mT}],
    }
    first = tries.pop(main, [])
    return [*first, *(one for group in tries.values() for one in group)]


def outputs_of(model: Any, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Return the floating-point outputs of a model."""
    torch.manual_seed(0)
    with torch.no_grad():
        result = model(**inputs)
    values = result.to_tuple() if hasattr(result, "to_tuple") else result
    return [v for v in _tensors(values) if v.is_floating_point()]


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _tensors(one)


def dequantized(packed: Any, dense: Any) -> Any:
    """Return a copy of the dense model that computes with the weights of the packed one."""
    model = copy.deepcopy(dense)
    expanded = expand_experts(model)
    layers = dict(packed.named_modules())
    with torch.no_grad():
        for name, module in model.named_modules():
            layer = layers.get(name)
            if isinstance(layer, LittleBitLinear):
                assert isinstance(module, nn.Linear)
                module.weight.copy_(layer.dequantize())
    collapse_experts(model, expanded)
    return model


def difference(first: Sequence[torch.Tensor], second: Sequence[torch.Tensor]) -> float:
    """Return the largest difference of two outputs, relative to the largest value."""
    if len(first) != len(second):
        return float("inf")
    worst = 0.0
    for a, b in zip(first, second, strict=True):
        if a.shape != b.shape:
            return float("inf")
        finite = torch.isfinite(a)
        if not torch.equal(finite, torch.isfinite(b)):
            return float("inf")
        scale = float(a[finite].abs().max()) if finite.any() else 0.0
        if scale:
            worst = max(worst, float((a - b)[finite].abs().max()) / scale)
    return worst


def packed_share(model: Any) -> float:
    """Return which share of the weights is in packed layers."""
    layers = [m for m in model.modules() if isinstance(m, LittleBitLinear)]
    packed = sum(m.in_features * m.out_features for m in layers)
    return packed / max(packed + sum(p.numel() for p in model.parameters()), 1)


class _Slow(Exception):
    """A class took longer than it may."""


def _ring(*_: Any) -> None:
    raise _Slow("took too long")


def try_class(name: str, model_type: str, folder: Path, *, seconds: int = 60) -> Outcome:
    """Try one model class; files go to ``folder``."""
    signal.signal(signal.SIGALRM, _ring)
    signal.alarm(seconds)
    try:
        return _try_class(name, model_type, folder)
    except _Slow as error:
        return Outcome(name, model_type, NOT_BUILT, str(error))
    finally:
        signal.alarm(0)


def _try_class(name: str, model_type: str, folder: Path) -> Outcome:
    try:
        dense = _dense_model(name, model_type, folder)
    except _Slow:
        raise
    except Exception as error:
        return Outcome(name, model_type, NOT_BUILT, _line(error))
    inputs = _working_inputs(dense)
    try:
        littlebit2.quantize_checkpoint(folder / "dense", folder / "files", QUANT, progress=False)
    except ValueError as error:
        return Outcome(name, model_type, REFUSED, _line(error))
    except _Slow:
        raise
    except Exception as error:
        return Outcome(name, model_type, FAILED, "quantize: " + _line(error))
    steps = _Steps()
    try:
        models = steps.run(dense, folder)
        reason = "" if inputs is None else _disagreement(models, dense, inputs)
    except _Slow:
        raise
    except Exception as error:
        return Outcome(name, model_type, FAILED, f"{steps.current}: " + _line(error))
    share = packed_share(models["files"])
    if reason or share == 0:
        return Outcome(name, model_type, FAILED, reason or "nothing is packed")
    return Outcome(name, model_type, WORKS, packed=share, compared=inputs is not None)


def _dense_model(name: str, model_type: str, folder: Path) -> Any:
    """Save a small random model in ``folder / "dense"`` and load it from there."""
    config = tiny_config(model_type)
    torch.manual_seed(0)
    with torch.device("meta"):
        size = sum(p.numel() for p in getattr(transformers, name)(copy.deepcopy(config)).parameters())
    if size > MOST_WEIGHTS:
        raise ValueError(f"its smallest configuration has {size:.1e} weights")
    model = getattr(transformers, name)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and not torch.isfinite(parameter).all():
                parameter.normal_(0, 0.02)
    model.save_pretrained(folder / "dense")
    return littlebit2.load(folder / "dense", dtype=torch.float32)


def _working_inputs(dense: Any) -> Any:
    """Return the first inputs that the dense model takes, or ``None``."""
    for candidate in inputs_of(dense):
        try:
            if outputs_of(dense, candidate):
                return candidate
        except _Slow:
            raise
        except Exception:
            continue
    return None


class _Steps:
    """What is done with a quantized checkpoint; ``current`` names the step that is under way."""

    def __init__(self) -> None:
        self.current = ""

    def run(self, dense: Any, folder: Path) -> dict[str, Any]:
        """Return packed models by how they came about."""
        self.current = "load"
        first = littlebit2.load(folder / "files", dtype=torch.float32)
        self.current = "save"
        first.save_pretrained(folder / "again")
        self.current = "load what was saved"
        second = littlebit2.load(folder / "again", dtype=torch.float32)
        self.current = "from_pretrained"
        type(first).from_pretrained(folder / "files")
        self.current = "in memory"
        memory = copy.deepcopy(dense)
        quantize_in_memory(memory)
        self.current = "save of what was quantized in memory"
        memory.save_pretrained(folder / "memory")
        self.current = "load of what was quantized in memory"
        third = littlebit2.load(folder / "memory", dtype=torch.float32)
        self.current = "forward"
        return {"files": first, "saved": second, "memory": third, "live": memory}


def _disagreement(models: dict[str, Any], dense: Any, inputs: Any) -> str:
    """Say which packed model is far from the dense one with its dequantized weights; empty if none is."""
    for what, packed in models.items():
        far = difference(outputs_of(dequantized(packed, dense), inputs), outputs_of(packed, inputs))
        if not far < FAR:
            return f"{what}: outputs differ by {far:.2g} from those of the dequantized model"
    return ""


def quantize_in_memory(model: Any) -> None:
    """Quantize a model in place, ready to be saved."""
    from littlebit2 import quantize_
    from littlebit2.integrations.transformers import attach

    quantize_(model, QUANT, progress=False)
    attach(model)


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: " + " ".join(str(error).split())[:220]


def sweep(names: Sequence[str] = (), *, seconds: int = 60, show: bool = True) -> list[Outcome]:
    """Try every model class, or those whose class or model type is in ``names``."""
    transformers.logging.set_verbosity_error()
    outcomes = []
    for model_type, name in model_classes().items():
        if names and name not in names and model_type not in names:
            continue
        folder = Path(tempfile.mkdtemp(prefix="family-"))
        try:
            with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
                warnings.simplefilter("ignore")
                outcome = try_class(name, model_type, folder, seconds=seconds)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        outcomes.append(outcome)
        if show:
            sys.stdout.write(f"{outcome.kind:9} {model_type:28} {name:44} {outcome.reason}\n")
            sys.stdout.flush()
    return outcomes


def markdown(outcomes: Sequence[Outcome]) -> str:
    """Return the table of docs/models.md."""
    order = {kind: index for index, kind in enumerate((FAILED, REFUSED, WORKS, NOT_BUILT))}
    rows = [
        f"| {one.model_type} | {one.model} | {one.kind} | {one.reason.replace('|', '/')[:160]} |"
        for one in sorted(outcomes, key=lambda one: (order[one.kind], one.model_type))
    ]
    counts = ", ".join(
        f"{sum(one.kind == kind for one in outcomes)} {kind}" for kind in (WORKS, REFUSED, FAILED, NOT_BUILT)
    )
    head = ["| model type | class | result | reason |", "|---|---|---|---|"]
    return "\n".join([f"{len(outcomes)} model types: {counts}.", "", *head, *rows]) + "\n"
