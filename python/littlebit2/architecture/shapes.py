"""Names and shapes of a model's tensors, from its ``config.json`` alone, where transformers is not installed.

One function per group of families, chosen by ``model_type``; nothing is guessed for a type that is not in
:data:`FAMILIES`. Names are those of the Hugging Face implementation of each family. Fused projections
(``qkv_proj`` and ``gate_up_proj`` of Phi-3 and Phi-4) are one layer, as they lie in the checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from .names import CAUSAL_HEAD, MASKED_HEAD, TIED_BY_DEFAULT

__all__ = ["FAMILIES", "DenseShape", "Kind", "LinearShape", "ModelShapes", "model_shapes"]

Kind = Literal["embedding", "norm", "bias", "other"]
Config = Mapping[str, Any]


@dataclass(frozen=True)
class LinearShape:
    """One linear layer: ``weight [out_features, in_features]`` and perhaps ``bias [out_features]``."""

    name: str
    in_features: int
    out_features: int
    bias: bool = False
    is_head: bool = False


@dataclass(frozen=True)
class DenseShape:
    """A tensor that no linear layer owns, by its full name."""

    name: str
    shape: tuple[int, ...]
    kind: Kind


@dataclass(frozen=True)
class ModelShapes:
    """All tensors of a model.

    Attributes:
        model_type: the family.
        linears: in model order; a head tied to the embedding is not listed.
        dense: embeddings, norms, biases that no packed or dense linear layer owns, and other matrices.
        tied_head: whether the head is the embedding.
    """

    model_type: str
    linears: tuple[LinearShape, ...]
    dense: tuple[DenseShape, ...]
    tied_head: bool


_Item = LinearShape | DenseShape


class _Reader:
    """Reads sizes from a configuration and names what is missing or wrong."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def size(self, name: str, default: int | None = None) -> int:
        value = self.config.get(name)
        if value is None:
            value = default
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"config: {name} must be a positive integer, got {value!r}")
        return value

    def flag(self, name: str, default: bool) -> bool:
        value = self.config.get(name, default)
        if not isinstance(value, bool):
            raise ValueError(f"config: {name} must be true or false, got {value!r}")
        return value

    def layers(self) -> range:
        return range(self.size("num_hidden_layers"))

    def heads(self, head_dim: int | None = None) -> tuple[int, int, int]:
        """Return (query heads, key heads, size of a head)."""
        heads = self.size("num_attention_heads")
        hidden = self.size("hidden_size")
        if head_dim is None and self.config.get("head_dim") is None and hidden % heads:
            raise ValueError(
                f"config: hidden_size = {hidden} must be a multiple of num_attention_heads = {heads}"
            )
        return (
            heads,
            self.size("num_key_value_heads", heads),
            self.size("head_dim", head_dim or hidden // heads),
        )


@dataclass(frozen=True)
class _Decoder:
    """How the Llama-like families differ from each other."""

    attention_bias: bool | None = None  # None: the configuration says (default false)
    output_bias: bool | None = None
    qk_norm: bool = False
    sandwich_norm: bool = False
    fused: bool = False
    head_dim: int | None = None


_DECODERS = {
    "gemma": _Decoder(head_dim=256),
    "gemma2": _Decoder(head_dim=256, sandwich_norm=True),
    "gemma3_text": _Decoder(head_dim=256, sandwich_norm=True, qk_norm=True),
    "llama": _Decoder(),
    "mistral": _Decoder(attention_bias=False, output_bias=False),
    "phi3": _Decoder(attention_bias=False, output_bias=False, fused=True),
    "qwen2": _Decoder(attention_bias=True, output_bias=False),
    "qwen3": _Decoder(qk_norm=True, head_dim=128),
}


def _decoder(config: Config) -> Iterator[_Item]:
    read, family = _Reader(config), _DECODERS[config["model_type"]]
    hidden, inner = read.size("hidden_size"), read.size("intermediate_size")
    heads, kv_heads, head_dim = read.heads(family.head_dim)
    bias = family.attention_bias
    qkv_bias = read.flag("attention_bias", False) if bias is None else bias
    out_bias = read.flag("attention_bias", False) if family.output_bias is None else family.output_bias
    mlp_bias = config["model_type"] == "llama" and read.flag("mlp_bias", False)
    yield DenseShape("model.embed_tokens.weight", (read.size("vocab_size"), hidden), "embedding")
    for i in read.layers():
        layer = f"model.layers.{i}"
        attention, mlp = f"{layer}.self_attn", f"{layer}.mlp"
        if family.fused:
            yield LinearShape(f"{attention}.qkv_proj", hidden, (heads + 2 * kv_heads) * head_dim, qkv_bias)
        else:
            yield LinearShape(f"{attention}.q_proj", hidden, heads * head_dim, qkv_bias)
            yield LinearShape(f"{attention}.k_proj", hidden, kv_heads * head_dim, qkv_bias)
            yield LinearShape(f"{attention}.v_proj", hidden, kv_heads * head_dim, qkv_bias)
        yield LinearShape(f"{attention}.o_proj", heads * head_dim, hidden, out_bias)
        if family.qk_norm:
            yield DenseShape(f"{attention}.q_norm.weight", (head_dim,), "norm")
            yield DenseShape(f"{attention}.k_norm.weight", (head_dim,), "norm")
        if family.fused:
            yield LinearShape(f"{mlp}.gate_up_proj", hidden, 2 * inner, mlp_bias)
        else:
            yield LinearShape(f"{mlp}.gate_proj", hidden, inner, mlp_bias)
            yield LinearShape(f"{mlp}.up_proj", hidden, inner, mlp_bias)
        yield LinearShape(f"{mlp}.down_proj", inner, hidden, mlp_bias)
        norms = ["input_layernorm", "post_attention_layernorm"]
        if family.sandwich_norm:
            norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
        for norm in norms:
            yield DenseShape(f"{layer}.{norm}.weight", (hidden,), "norm")
    yield DenseShape("model.norm.weight", (hidden,), "norm")
    yield LinearShape(CAUSAL_HEAD, hidden, read.size("vocab_size"), is_head=True)


def _layer_norm(name: str, size: int) -> Iterator[_Item]:
    yield DenseShape(f"{name}.weight", (size,), "norm")
    yield DenseShape(f"{name}.bias", (size,), "norm")


def _phi(config: Config) -> Iterator[_Item]:
    read = _Reader(config)
    hidden, inner = read.size("hidden_size"), read.size("intermediate_size")
    heads, kv_heads, head_dim = read.heads()
    yield DenseShape("model.embed_tokens.weight", (read.size("vocab_size"), hidden), "embedding")
    for i in read.layers():
        layer = f"model.layers.{i}"
        yield LinearShape(f"{layer}.self_attn.q_proj", hidden, heads * head_dim, True)
        yield LinearShape(f"{layer}.self_attn.k_proj", hidden, kv_heads * head_dim, True)
        yield LinearShape(f"{layer}.self_attn.v_proj", hidden, kv_heads * head_dim, True)
        yield LinearShape(f"{layer}.self_attn.dense", heads * head_dim, hidden, True)
        if read.flag("qk_layernorm", False):
            yield from _layer_norm(f"{layer}.self_attn.q_layernorm", hidden // heads)
            yield from _layer_norm(f"{layer}.self_attn.k_layernorm", hidden // heads)
        yield LinearShape(f"{layer}.mlp.fc1", hidden, inner, True)
        yield LinearShape(f"{layer}.mlp.fc2", inner, hidden, True)
        yield from _layer_norm(f"{layer}.input_layernorm", hidden)
    yield from _layer_norm("model.final_layernorm", hidden)
    yield LinearShape(CAUSAL_HEAD, hidden, read.size("vocab_size"), True, is_head=True)


#: OPT's position table starts with two rows that are never looked up.
_OPT_POSITION_OFFSET = 2


def _opt(config: Config) -> Iterator[_Item]:
    read = _Reader(config)
    hidden, inner = read.size("hidden_size"), read.size("ffn_dim")
    vocab, bias = read.size("vocab_size"), read.flag("enable_bias", True)
    affine = read.flag("layer_norm_elementwise_affine", True)
    word = read.size("word_embed_proj_dim", hidden)
    positions = read.size("max_position_embeddings") + _OPT_POSITION_OFFSET
    decoder = "model.decoder"
    yield DenseShape(f"{decoder}.embed_tokens.weight", (vocab, word), "embedding")
    yield DenseShape(f"{decoder}.embed_positions.weight", (positions, hidden), "embedding")
    if word != hidden:
        yield LinearShape(f"{decoder}.project_out", hidden, word)
        yield LinearShape(f"{decoder}.project_in", word, hidden)
    norms_first = read.flag("do_layer_norm_before", True)
    if affine and norms_first and not read.flag("_remove_final_layer_norm", False):
        yield from _layer_norm(f"{decoder}.final_layer_norm", hidden)
    for i in read.layers():
        layer = f"{decoder}.layers.{i}"
        for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
            yield LinearShape(f"{layer}.self_attn.{name}", hidden, hidden, bias)
        if affine:
            yield from _layer_norm(f"{layer}.self_attn_layer_norm", hidden)
        yield LinearShape(f"{layer}.fc1", hidden, inner, bias)
        yield LinearShape(f"{layer}.fc2", inner, hidden, bias)
        if affine:
            yield from _layer_norm(f"{layer}.final_layer_norm", hidden)
    yield LinearShape(CAUSAL_HEAD, word, vocab, is_head=True)


def _bert(config: Config) -> Iterator[_Item]:
    read = _Reader(config)
    architecture = (config.get("architectures") or ["BertModel"])[0]
    if architecture not in ("BertModel", "BertForMaskedLM"):
        raise ValueError(
            f"config: architectures of a bert must be BertModel or BertForMaskedLM, got {architecture!r}"
        )
    masked = architecture == "BertForMaskedLM"
    root = "bert." if masked else ""
    hidden, inner, vocab = read.size("hidden_size"), read.size("intermediate_size"), read.size("vocab_size")
    for name, rows in (
        ("word", vocab),
        ("position", read.size("max_position_embeddings")),
        ("token_type", read.size("type_vocab_size", 2)),
    ):
        yield DenseShape(f"{root}embeddings.{name}_embeddings.weight", (rows, hidden), "embedding")
    yield from _layer_norm(f"{root}embeddings.LayerNorm", hidden)
    for i in read.layers():
        layer = f"{root}encoder.layer.{i}"
        for name in ("query", "key", "value"):
            yield LinearShape(f"{layer}.attention.self.{name}", hidden, hidden, True)
        yield LinearShape(f"{layer}.attention.output.dense", hidden, hidden, True)
        yield from _layer_norm(f"{layer}.attention.output.LayerNorm", hidden)
        yield LinearShape(f"{layer}.intermediate.dense", hidden, inner, True)
        yield LinearShape(f"{layer}.output.dense", inner, hidden, True)
        yield from _layer_norm(f"{layer}.output.LayerNorm", hidden)
    if masked:
        yield LinearShape("cls.predictions.transform.dense", hidden, hidden, True)
        yield from _layer_norm("cls.predictions.transform.LayerNorm", hidden)
        yield LinearShape(MASKED_HEAD, hidden, vocab, is_head=True)
        yield DenseShape("cls.predictions.bias", (vocab,), "bias")
    else:
        yield LinearShape(f"{root}pooler.dense", hidden, hidden, True)


#: Every ``model_type`` whose shapes are known, with the function that lists them.
FAMILIES: dict[str, Callable[[Config], Iterator[_Item]]] = {
    **dict.fromkeys(_DECODERS, _decoder),
    "phi": _phi,
    "opt": _opt,
    "bert": _bert,
}


def model_shapes(config: Config) -> ModelShapes:
    """Return every tensor's name and shape of the model that ``config`` describes.

    Args:
        config: the content of a ``config.json``; sizes it leaves out take the family's defaults where
            the family has one (key/value heads, size of a head, biases, tying).

    Raises:
        ValueError: ``model_type`` is missing or not in :data:`FAMILIES`, or a size is missing or no
            positive integer; the message names it.
    """
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        hint = " (its text_config can be planned on its own)" if "text_config" in config else ""
        raise ValueError(
            f"config: model_type must be one of {', '.join(sorted(FAMILIES))}, got {model_type!r}{hint}"
        )
    tied = _Reader(config).flag("tie_word_embeddings", model_type in TIED_BY_DEFAULT)
    items = list(FAMILIES[model_type](config))
    has_head = any(isinstance(item, LinearShape) and item.is_head for item in items)
    if tied:
        items = [_without_weight(item) for item in items if not _is_bare_head(item)]
    return ModelShapes(
        model_type=model_type,
        linears=tuple(item for item in items if isinstance(item, LinearShape)),
        dense=tuple(item for item in items if isinstance(item, DenseShape)),
        tied_head=tied and has_head,
    )


def _is_bare_head(item: _Item) -> bool:
    return isinstance(item, LinearShape) and item.is_head and not item.bias


def _without_weight(item: _Item) -> _Item:
    """A tied head leaves its bias behind."""
    if isinstance(item, LinearShape) and item.is_head:
        return DenseShape(f"{item.name}.bias", (item.out_features,), "bias")
    return item
