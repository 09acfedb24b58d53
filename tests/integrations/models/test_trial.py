"""What becomes of every weight is settled before the work: heads, ties, what is missing, what code reads."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import littlebit2
from littlebit2.architecture.linears import dense_reasons, is_plain_linear
from littlebit2.architecture.select import DEFAULT_EXCLUDE
from littlebit2.integrations.skeleton import UnknownModelError, skeleton
from littlebit2.integrations.trial import try_out
from littlebit2.offline import quantize_checkpoint
from littlebit2.quantize import QuantConfig
from littlebit2_kernels import LittleBitLinear
from tests.integrations.models.moe import QUANT

LLAMA = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def llama(path: Path, **changes: object) -> Path:
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**LLAMA, **changes})).save_pretrained(path)
    return path


@pytest.mark.parametrize("head_in_file", [False, True])
def test_a_tied_head_stays_tied_unless_it_is_asked_for(head_in_file: bool, tmp_path: Path) -> None:
    source = llama(tmp_path / "dense", tie_word_embeddings=True)
    if head_in_file:
        tensors = load_file(source / "model.safetensors")
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        save_file(tensors, source / "model.safetensors", {"format": "pt"})
    quantize_checkpoint(source, tmp_path / "tied", QUANT, progress=False)
    tied = littlebit2.load(tmp_path / "tied")
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    quantize_checkpoint(source, tmp_path / "untied", QUANT, exclude=(), progress=False)
    for load in (littlebit2.load, transformers.AutoModelForCausalLM.from_pretrained):
        untied = load(tmp_path / "untied")
        assert isinstance(untied.lm_head, LittleBitLinear)
        assert isinstance(untied.model.embed_tokens, nn.Embedding)
        assert untied.config.tie_word_embeddings is False


def test_heads_of_other_names_stay_dense() -> None:
    config = transformers.BertConfig(
        vocab_size=160, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4
    )
    model = transformers.BertForMaskedLM(config)
    littlebit2.quantize_(model, QUANT, progress=False)
    assert type(model.get_output_embeddings()) is nn.Linear
    assert isinstance(model.cls.predictions.transform.dense, LittleBitLinear)


def test_weights_that_code_reads_stay_dense(tmp_path: Path) -> None:
    config = transformers.RwkvConfig(
        vocab_size=160, hidden_size=64, attention_hidden_size=64, num_hidden_layers=7, context_length=64
    )
    model = transformers.RwkvForCausalLM(config)
    model.save_pretrained(tmp_path / "dense")
    reasons = dense_reasons(model)
    assert "reads its weight" in reasons["rwkv.blocks.0.attention.output"]
    assert "rwkv.blocks.0.attention.key" not in reasons
    quantize_checkpoint(tmp_path / "dense", tmp_path / "q", QUANT, progress=False)
    packed = littlebit2.load(tmp_path / "q")
    assert torch.isfinite(packed(torch.arange(3, 9)[None]).logits).all()
    assert type(packed.rwkv.blocks[0].attention.output) is nn.Linear


def test_attention_of_torch_stays_dense() -> None:
    reasons = dense_reasons(nn.Sequential(nn.MultiheadAttention(16, 2)))
    assert "nn.MultiheadAttention" in reasons["0.out_proj"]


class _Negative(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return -super().forward(x)


class _Written(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias


def test_subclasses_are_linear_layers_if_they_compute_one() -> None:
    assert is_plain_linear(_Written(4, 6))
    assert is_plain_linear(_Written(4, 6, bias=False))
    assert not is_plain_linear(_Negative(4, 6))
    assert not is_plain_linear(nn.Embedding(4, 6))
    falcon = transformers.FalconForCausalLM(
        transformers.FalconConfig(vocab_size=160, hidden_size=64, num_hidden_layers=1, num_attention_heads=4)
    )
    littlebit2.quantize_(falcon, QUANT, progress=False)
    assert isinstance(falcon.transformer.h[0].mlp.dense_h_to_4h, LittleBitLinear)


def test_missing_weights_are_refused_before_any_work(tmp_path: Path) -> None:
    source = llama(tmp_path / "dense")
    tensors = load_file(source / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lack weights of LlamaForCausalLM: model\.layers\.0\.mlp\.up_proj"):
        quantize_checkpoint(source, tmp_path / "q", QUANT, progress=False)
    assert not (tmp_path / "q.partial").exists()


def test_a_folder_without_configuration_is_refused(tmp_path: Path) -> None:
    source = llama(tmp_path / "dense")
    (source / "config.json").unlink()
    with pytest.raises(ValueError, match=r"config\.json is missing"):
        quantize_checkpoint(source, tmp_path / "q", QUANT, progress=False)


def test_an_empty_selection_says_what_there_was(tmp_path: Path) -> None:
    source = llama(tmp_path / "dense")
    with pytest.raises(ValueError, match=r"7 excluded \(model\.layers\.0\.self_attn\.q_proj, \.\.\.\)"):
        quantize_checkpoint(source, tmp_path / "q", QUANT, exclude=[*DEFAULT_EXCLUDE, "*"], progress=False)


def test_layers_too_small_for_the_budget_stay_dense(tmp_path: Path) -> None:
    source = llama(tmp_path / "dense", head_dim=8, num_key_value_heads=1)  # key and value: 64 x 8
    config = QuantConfig(bpw=1.0, method="joint-itq", itq_iterations=1, paths=1)
    report = quantize_checkpoint(source, tmp_path / "q", config, progress=False)
    packed = {layer["name"].rpartition(".")[2] for layer in report.layers}
    assert packed == {"q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    littlebit2.load(tmp_path / "q")


def test_every_matrix_has_a_verdict() -> None:
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))
    tensors = {name: (tuple(t.shape), t.dtype) for name, t in model.state_dict().items()}
    tensors["model.extra.weight"] = ((4, 4), torch.float32)
    config = {**model.config.to_dict(), "architectures": ["LlamaForCausalLM"]}
    trial = try_out(config, tensors, include=["*"], exclude=DEFAULT_EXCLUDE)
    assert len(trial.layers) == 7
    assert trial.dense == {"model.embed_tokens": "embedding", "lm_head": "output head"}
    assert trial.left_out == ("model.extra.weight",)


@pytest.mark.parametrize("config", [{}, {"model_type": "nobody_knows"}])
def test_unknown_models_cannot_be_built(config: dict[str, str]) -> None:
    with pytest.raises(UnknownModelError, match="model_type must be one that transformers"):
        skeleton(config)


BASE = """
import torch
from torch import nn

class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(64, 64) for _ in range(3))

    def forward(self, x):
        key = self.key
        return nn.functional.linear(self.value(x), self.query.weight) + x @ key.weight.T
"""


def test_weights_that_base_classes_read_and_local_variables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lb2_test_base.py").write_text(BASE)
    (tmp_path / "lb2_test_derived.py").write_text(
        "import lb2_test_base\n\nclass Own(lb2_test_base.Attention):\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    model = nn.Sequential(importlib.import_module("lb2_test_derived").Own())
    report = littlebit2.quantize_(model, 1.0, progress=False)
    assert [layer.name for layer in report.layers] == ["0.value"]
    assert model(torch.zeros(1, 64)).shape == (1, 64)


def test_conversions_of_two_checkpoints_are_not_mixed(tmp_path: Path) -> None:
    """What was converted last is kept, but not for another checkpoint."""
    config = transformers.Qwen3MoeConfig(
        **LLAMA, head_dim=16, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=48
    )
    loads, trials = [], []
    for seed in (0, 1):
        torch.manual_seed(seed)
        path = tmp_path / str(seed)
        transformers.Qwen3MoeForCausalLM(config).save_pretrained(path)
        tensors = load_file(path / "model.safetensors")
        headers = {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}
        trials.append(try_out(config.to_dict(), headers, include=("*",), exclude=DEFAULT_EXCLUDE))
        loads.append(lambda name, index=None, tensors=tensors: tensors[name])
    parts = [part for part in trials[0].parts.values() if hasattr(part, "latest")]
    assert parts
    for part in parts:
        first, other = (part.read(load).clone() for load in loads)
        assert not torch.equal(first, other)
        assert torch.equal(part.read(loads[0]), first)
