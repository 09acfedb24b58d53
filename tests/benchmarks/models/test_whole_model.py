"""The whole-model benchmark on a tiny Llama; nothing here looks at a measured time."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.__main__ import main
from benchmarks.models.decode import (
    PARTS,
    DecodeTimer,
    GenerateDecode,
    LoadedDecode,
    Profile,
    StaticDecode,
    generate,
    profile_decode,
)
from benchmarks.models.llama import build_dense, build_packed, load_random, twin, weight_bytes
from benchmarks.models.model_rows import extrapolate
from benchmarks.shapes import LLAMA_SHAPES, LlamaShape, parse_llama_shape
from benchmarks.timing import Timing
from littlebit2_kernels import Int8Embedding, Int8Linear, LittleBitLinear

TINY = LLAMA_SHAPES["tiny"]
PROMPT = torch.arange(5)[None]
needs_transformers = pytest.mark.skipif(
    importlib.util.find_spec("transformers") is None, reason="needs transformers"
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def packed() -> Any:
    pytest.importorskip("transformers")
    return build_packed(TINY, 2, 1.0, torch.float32)


# --- models --------------------------------------------------------------------------------------------


def test_packed_model(packed: Any) -> None:
    layers = {name: m for name, m in packed.named_modules() if isinstance(m, LittleBitLinear)}
    assert len(layers) == 2 * 7
    assert not any("lm_head" in name for name in layers)
    assert {name for name, m in packed.named_modules() if isinstance(m, nn.Linear)} == {"lm_head"}
    assert all("prepacked" in layer._buffers for layer in layers.values())
    macs = sum(layer.in_features * layer.out_features for layer in layers.values())
    assert macs == TINY.linear_macs(2)
    assert weight_bytes(packed) < weight_bytes(build_dense(TINY, 2, torch.float32)) / 2


def test_rotary_frequencies_are_those_of_transformers(packed: Any) -> None:
    transformers = pytest.importorskip("transformers")
    usual = transformers.LlamaForCausalLM(packed.config)
    torch.testing.assert_close(packed.model.rotary_emb.inv_freq, usual.model.rotary_emb.inv_freq)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_finite(dtype: torch.dtype) -> None:
    pytest.importorskip("transformers")
    for model in (build_packed(TINY, 2, 0.5, dtype), build_dense(TINY, 2, dtype)):
        with torch.inference_mode():
            logits = model(PROMPT).logits
        assert logits.dtype == dtype
        assert logits.isfinite().all()
        assert logits.std() > 0.01


def test_same_tokens_as_the_reference_backend(packed: Any) -> None:
    reference = build_packed(TINY, 2, 1.0, torch.float32, backend="reference")
    expected = generate(reference, PROMPT, 12)
    actual = generate(packed, PROMPT, 12)
    assert actual.tokens == expected.tokens
    assert len(set(actual.tokens)) > 1
    assert len(actual.steps) == 11


def test_twins_share_weights(packed: Any) -> None:
    other = twin(packed, TINY, layers=1)
    assert other.config.num_hidden_layers == len(other.model.layers) == 1
    assert packed.config.num_hidden_layers == len(packed.model.layers) == 2
    name = "model.layers.0.mlp.up_proj"
    assert other.get_submodule(name) is packed.get_submodule(name)
    assert other.lm_head is packed.lm_head
    assert generate(twin(packed, TINY, layers=2), PROMPT, 4).tokens == generate(packed, PROMPT, 4).tokens


@needs_transformers
@pytest.mark.parametrize(
    ("head", "head_kind", "embedding_kind"),
    [
        ("keep", nn.Linear, nn.Embedding),
        ("int8", Int8Linear, Int8Embedding),
        ("packed", LittleBitLinear, Int8Embedding),
    ],
)
def test_loaded_model(head: str, head_kind: type, embedding_kind: type, tmp_path: Path) -> None:
    model = load_random(tmp_path / "m", TINY, 2, 1.0, torch.float32, paths=1, head=head)
    assert type(model.lm_head) is head_kind
    assert type(model.model.embed_tokens) is embedding_kind
    layers = [module for module in model.modules() if isinstance(module, LittleBitLinear)]
    assert len(layers) == 2 * 7 + (head == "packed")
    decode = LoadedDecode(model, PROMPT, 6)
    assert decode() > 0
    (made,) = decode.generations
    assert len(made.steps) == 5
    assert made.tokens == generate(model, PROMPT, 6).tokens


def test_tensors_that_would_stay_empty_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    modeling = pytest.importorskip("transformers.models.llama.modeling_llama")
    plain = modeling.LlamaMLP.__init__

    def with_more(self: Any, config: Any) -> None:
        plain(self, config)
        self.register_buffer("unknown", torch.zeros(3))

    monkeypatch.setattr(modeling.LlamaMLP, "__init__", with_more)
    with pytest.raises(RuntimeError, match=r"does not fill: model\.layers\.0\.mlp\.unknown"):
        build_dense(TINY, 1, torch.float32)


# --- steps and parts -----------------------------------------------------------------------------------


def test_profile_sums_to_the_step(packed: Any) -> None:
    decode = GenerateDecode(packed, PROMPT, 6)
    forwards = [module.__dict__.get("forward") for module in packed.modules()]
    profile = profile_decode(decode)
    assert [module.__dict__.get("forward") for module in packed.modules()] == forwards
    assert decode.generations == []
    assert tuple(profile.parts) == PARTS
    assert sum(profile.shares.values()) == pytest.approx(1)
    assert sum(profile.parts.values()) == pytest.approx(profile.step)
    assert all(seconds > 0 for seconds in profile.parts.values())


def test_profile_restores_what_was_replaced(packed: Any) -> None:
    model = twin(packed, TINY, layers=2)
    plain = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if kwargs["input_ids"].shape[1] == 1:
            raise RuntimeError("stop")
        return plain(*args, **kwargs)

    model.forward = forward
    with pytest.raises(RuntimeError, match="stop"):
        profile_decode(GenerateDecode(model, PROMPT, 3))
    assert model.__dict__["forward"] is forward
    assert "forward" not in model.lm_head.__dict__


def test_shares() -> None:
    assert Profile(4.0, {"a": 1.0, "b": 3.0}, plain=3.9).shares == {"a": 0.25, "b": 0.75}


def test_decode_timer(packed: Any) -> None:
    decode = GenerateDecode(packed, PROMPT, 3)
    turn = DecodeTimer().prepare([decode], seconds=1, cold=True, setup=None)
    assert decode.generations == []
    assert turn() > 0
    assert len(decode.generations) == 1
    assert len(decode.steps) == 2
    with pytest.raises(TypeError, match="runs must hold one Decode, got function"):
        DecodeTimer().prepare([lambda: None], seconds=1, cold=True, setup=None)


def test_static_decode_makes_the_same_tokens(packed: Any) -> None:
    decode = StaticDecode(packed, PROMPT, 6, "eager")
    assert decode() > 0
    assert decode() > 0
    expected = generate(packed, PROMPT, 6).tokens
    assert [generation.tokens for generation in decode.generations] == [expected] * 2
    assert [len(generation.steps) for generation in decode.generations] == [5] * 2
    batch = StaticDecode(packed, PROMPT.repeat(3, 1), 6, "eager").run()
    assert batch.tokens == expected


def test_too_few_tokens(packed: Any) -> None:
    with pytest.raises(ValueError, match=r"tokens must be at least 2, .* got 1"):
        generate(packed, PROMPT, 1)


def test_a_model_that_stops(packed: Any) -> None:
    third = generate(packed, PROMPT, 3).tokens[-1]
    with pytest.raises(ValueError, match="generate must make 8 tokens, it stopped after"):
        generate(packed, PROMPT, 8, eos_token_id=third)


# --- arithmetic and the command ------------------------------------------------------------------------


def test_extrapolation() -> None:
    fixed, layer = 0.009, 0.0125
    step, own_fixed, own_layer = extrapolate(fixed + 2 * layer, fixed + 4 * layer, (2, 4), 32)
    assert step == pytest.approx(fixed + 32 * layer)
    assert own_fixed == pytest.approx(fixed)
    assert own_layer == pytest.approx(layer)


@pytest.mark.parametrize("counts", [(4, 2), (2, 2), (0, 2)])
def test_bad_counts(counts: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="counts must be two increasing positive numbers"):
        extrapolate(1.0, 2.0, counts, 32)


WHOLE = ["whole-model", "--shape", "tiny", "--bpw", "1", "--prompt", "4", "--tokens", "3", "--rounds", "2"]
WHOLE += ["--threads", "1"]


@needs_transformers
def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "whole.json"
    options = ["--layers", "4", "--dense-layers", "2", "--heads", "int8", "packed", "--prompt", "3", "6"]
    before = torch.get_num_threads()
    assert main([*WHOLE, *options, "--profile", "--json", str(path)]) == 0
    assert torch.get_num_threads() == before
    output = capsys.readouterr().out
    assert "4, extrapolated from 1 and 2 layers" in output
    assert "vs dense bfloat16 (extrapolated)" in output
    content = json.loads(path.read_text("utf-8"))
    assert content["benchmark"] == "whole-model"
    assert content["environment"]["threads"] == [1]
    rows = {(row["name"], row["prompt"]): row for row in content["rows"]}
    packed = ["packed 1 bpw, plain", "packed 1 bpw, loaded, int8 head", "packed 1 bpw, loaded, packed head"]
    dense = ["dense bfloat16, 1 layers", "dense bfloat16, 2 layers", "dense bfloat16"]
    assert set(rows) == {(name, prompt) for name in (*packed, *dense) for prompt in (3, 6)}
    for prompt in (3, 6):
        few, many = (rows[name, prompt] for name in dense[:2])
        whole = rows["dense bfloat16", prompt]
        expected = [
            extrapolate(a, b, (1, 2), 4)[0] for a, b in zip(few["samples"], many["samples"], strict=True)
        ]
        assert whole["samples"] == pytest.approx(expected)
        assert whole["measured_layers"] == [1, 2]
        assert whole["prefill"] == pytest.approx(extrapolate(few["prefill"], many["prefill"], (1, 2), 4)[0])
        assert whole["weight_bytes"] == weight_bytes(build_dense(TINY, 4, torch.bfloat16))
        plain, loaded = rows[packed[0], prompt], rows[packed[1], prompt]
        assert set(plain["speedups"]) == {"dense bfloat16"}
        assert set(loaded["speedups"]) == {"dense bfloat16", "plain"}
        for peer, other in (("plain", plain), ("dense bfloat16", whole)):
            ratio = Timing(tuple(loaded["samples"])).speedup_over(Timing(tuple(other["samples"])))
            assert loaded["speedups"][peer][0] == pytest.approx(ratio)
    assert set(content["profiles"]) == {f"{name}, prompt {prompt}" for name in packed for prompt in (3, 6)}
    assert main(["plot", str(path), "--out", str(tmp_path / "figures")]) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "figures" / "steps.png")]
    assert (tmp_path / "figures" / "steps.png").read_bytes().startswith(b"\x89PNG")
    content["profiles"] = {}
    path.write_text(json.dumps(content), "utf-8")
    assert main(["plot", str(path), "--out", str(tmp_path / "none")]) == 2
    assert "must hold profiles, it has none" in capsys.readouterr().err


@needs_transformers
def test_every_step(tmp_path: Path) -> None:
    path = tmp_path / "steps.json"
    arguments = ["--layers", "1", "--bpw", "0.5", "1", "--rows", "2", "--steps", "eager", "graph"]
    assert main([*WHOLE, *arguments, "--json", str(path)]) == 0
    content = json.loads(path.read_text())
    rows = {row["name"]: row for row in content["rows"]}
    kinds = ("plain", "loaded, int8 head")
    models = [*(f"packed {bpw} bpw, {kind}" for bpw in ("0.5", "1") for kind in kinds), "dense bfloat16"]
    assert list(rows) == [f"{model}, eager" for model in models]
    assert list(content["unavailable"]) == [f"{model}, graph" for model in models]
    assert "needs a model on a CUDA device" in content["unavailable"]["dense bfloat16, graph"]
    for name, row in rows.items():
        assert (len(row["samples"]), row["step"], row["form"]) == (
            2,
            "eager",
            "loaded" if "loaded" in name else "plain",
        )
        assert min(row["samples"]) > 0


@needs_transformers
def test_steps_that_cannot_run_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*WHOLE, "--steps", "graph", "--dense"]) == 1
    assert "not measured: packed 1 bpw, plain, graph: ValueError" in capsys.readouterr().err


@needs_transformers
def test_dense_measured_whole(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*WHOLE, "--layers", "1", "--dense", "float32", "--dtype", "float32"]) == 0
    output = capsys.readouterr().out
    assert "| dense float32 " in output
    assert "extrapolated" not in output


@needs_transformers
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shape", "llama9"], "shape must be one of llama2-7b, llama2-13b, llama3-8b, tiny, got 'llama9'"),
        (["--dtype", "int8"], "dtype must be one of .* got 'int8'"),
        (["--dense", "int4"], "dtype must be one of .* got 'int4'"),
        (["--tokens", "1"], "tokens must be at least 2"),
        (["--rows", "2"], "rows must be 1 with the step 'generate', got 2"),
        (["--threads", "100000"], "threads must be at most .* got 100000"),
        (["--layers", "8", "--dense-layers", "1"], "dense-layers must be at least 2 .* to 8 layers, got 1"),
        (["--memory-gib", "1e-6"], "linear layers of all models must fit into 1e-06 GiB"),
        (["--bpw", "0.1"], "bpw must be above 0.25"),
        (["--bpw", "--dense"], "bpw and dense must name one model at least"),
    ],
)
def test_bad_requests(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*WHOLE, *arguments]) == 2
    assert re.search("error: .*" + message, capsys.readouterr().err)


def test_without_transformers(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(WHOLE) == 2
    assert "whole-model needs the package transformers: pip install" in capsys.readouterr().err


def test_shapes() -> None:
    shape = parse_llama_shape("llama2-7b")
    assert isinstance(shape, LlamaShape)
    assert shape.linear_macs(shape.layers) == 6_476_005_376
