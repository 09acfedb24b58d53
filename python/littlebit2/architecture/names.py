"""Names of model parts: the only place that lists them. Imports nothing."""

from __future__ import annotations

__all__ = [
    "CAUSAL_HEAD",
    "DEFAULT_EXCLUDE",
    "EMBEDDINGS",
    "EMBEDDING_WEIGHTS",
    "FUSED",
    "MASKED_HEAD",
    "PROJECTIONS",
    "ROUTERS",
    "TIED_BY_DEFAULT",
    "TRANSPOSED",
    "is_causal_name",
    "is_key_or_value",
    "is_linear_name",
]

#: The head of a causal language model, as nearly every family names it.
CAUSAL_HEAD = "lm_head"
#: The head of a masked language model, of BERT and its kin.
MASKED_HEAD = "cls.predictions.decoder"

#: Patterns of layers that stay dense by default: heads, as in the papers.
DEFAULT_EXCLUDE = (
    f"*{CAUSAL_HEAD}*",
    "score",
    "classifier",
    "classifier.*",
    "qa_outputs",
    MASKED_HEAD,
    "cls.seq_relationship",
)

#: Embeddings whose module name does not contain ``embed``.
EMBEDDINGS = ("wte", "wpe", "shared", "relative_attention_bias")
#: Routers of mixtures of experts.
ROUTERS = ("gate", "router", "shared_expert_gate")

#: Endings of the name of the token embedding's weight, to which a head may be tied.
EMBEDDING_WEIGHTS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight")
#: Families (``model_type``) whose config.json leaves ``tie_word_embeddings`` out when it is true.
TIED_BY_DEFAULT = ("gemma", "gemma2", "gemma3", "gemma3_text", "opt", "bert", "gpt2")

#: Modules of one parent that are called with the same input, one after another.
PROJECTIONS = (
    ("q_proj", "k_proj", "v_proj"),  # Llama and most others
    ("query", "key", "value"),  # BERT
    ("q_lin", "k_lin", "v_lin"),  # DistilBERT
    ("gate_proj", "up_proj"),  # gated MLPs
    ("w1", "w3"),  # Mixtral's experts
)

#: Projections that some families fuse into one module, and the separate ones that a checkpoint may hold
#: instead, in the order of the fused rows: the LittleBit authors split them before they quantize.
FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}

#: Families (``model_type``) that store their matrices transposed, ``[in, out]``, under the same names.
TRANSPOSED = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")

_KEY_OR_VALUE = ("k_proj", "v_proj")


def is_key_or_value(name: str) -> bool:
    """Whether a linear layer projects to keys or values; ``kv_factor`` applies to its rank."""
    return name.endswith(_KEY_OR_VALUE)


def is_causal_name(architecture: str) -> bool:
    """Whether a class of transformers is a causal language model, to judge by its name."""
    return architecture.endswith(("ForCausalLM", "LMHeadModel"))


def is_linear_name(module: str) -> bool:
    """Whether a module of this name can be a linear layer: no embedding, norm or router."""
    last = module.rpartition(".")[2].lower()
    return not ("embed" in last or "norm" in last or last in EMBEDDINGS or last in ROUTERS)
