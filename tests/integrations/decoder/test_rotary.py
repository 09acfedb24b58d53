"""Rotations of queries and keys in one call: of which functions, when, and with what results."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch.autograd import forward_ad

from littlebit2.architecture.decoder import fuse_modules
from littlebit2.architecture.decoder.rotary import Rotation, rotated, rotation_of
from tests.integrations.decoder.calls import Calls
from tests.integrations.families import assert_same, dense_model, quantized_copy, token_ids

#: What the function of a family is: interleaved, for a part of the row, in its dtype whatever angles have.
FUNCTIONS = {
    **dict.fromkeys(("llama", "qwen2", "qwen3", "gemma2", "gemma3", "mistral"), (False, False, False)),
    **dict.fromkeys(("phi3", "gpt_neox"), (False, True, False)),
    **dict.fromkeys(("cohere", "cohere2"), (True, False, True)),
    "olmo2": (False, False, True),
    "glm": None,  # reads the first half of the angles alone
}


def _function(family: str) -> Any:
    return importlib.import_module(f"transformers.models.{family}.modeling_{family}").apply_rotary_pos_emb


@pytest.mark.parametrize("family", FUNCTIONS)
def test_functions_of_families(family: str) -> None:
    found = rotation_of(_function(family))
    what = None if found is None else (found.interleaved, found.partial, found.keeps_dtype)
    assert what == FUNCTIONS[family]


def _half(x: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat((-b, a), dim=-1)


def _turning(x: torch.Tensor) -> torch.Tensor:
    return _half(x) if x.shape[2] else x


def _plain(q: Any, k: Any, cos: Any, sin: Any) -> Any:
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return q * cos + _half(q) * sin, k * cos + _half(k) * sin


def _other_way(q: Any, k: Any, cos: Any, sin: Any) -> Any:
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return q * cos - _half(q) * sin, k * cos - _half(k) * sin


def _scaled(q: Any, k: Any, cos: Any, sin: Any) -> Any:
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return q * cos + _half(q) * sin, 2 * (k * cos + _half(k) * sin)


def _other_places(q: Any, k: Any, cos: Any, sin: Any) -> Any:
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    return q * cos + _half(q) * sin, k * cos + _half(k) * sin


def _in_place(q: Any, k: Any, cos: Any, sin: Any) -> Any:
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    q.copy_(q * cos + _half(q) * sin)
    return q, k * cos + _half(k) * sin


def _with_a_turn(q: Any, k: Any, cos: Any, sin: Any) -> Any:
    if q.shape[2] > 1:
        return _plain(q, k, cos, sin)
    return q, k


def _with_a_helper_that_turns(q: Any, k: Any, cos: Any, sin: Any) -> Any:
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return q * cos + _turning(q) * sin, k * cos + _turning(k) * sin


def _list(q: Any, k: Any, cos: Any, sin: Any) -> Any:
    return list(_plain(q, k, cos, sin))


def _around(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        return function(*arguments)

    return call


def _marked(function: Callable[..., Any]) -> Callable[..., Any]:
    function.__dict__["mark"] = 1
    return function


@_marked
def _decorated(q: Any, k: Any, cos: Any, sin: Any) -> Any:
    return _plain(q, k, cos, sin)


def test_functions_that_rotate() -> None:
    for function in (_plain, _decorated):
        assert rotation_of(function) == Rotation(function, False, False, False)


@pytest.mark.parametrize(
    "function",
    [
        *(_other_way, _scaled, _other_places, _in_place, _with_a_turn, _with_a_helper_that_turns, _list),
        *(_around(_plain), torch.add, None, []),
    ],
    ids=lambda one: getattr(one, "__name__", str(one)),
)
def test_functions_that_do_not(function: Any) -> None:
    assert rotation_of(function) is None


# --- calls -----------------------------------------------------------------------------------------------


def _tensors(
    rng: torch.Generator,
    dtype: torch.dtype,
    batch: int = 2,
    tokens: int = 3,
    size: int = 16,
    turned: int = 16,
) -> list[torch.Tensor]:
    """Query and key as attentions make them, cos and sin."""
    heads = [torch.randn(batch, tokens, count, size, generator=rng) for count in (4, 2)]
    angles = 3 * torch.randn(batch, tokens, turned, generator=rng)
    return [one.to(dtype) for one in (*(x.transpose(1, 2) for x in heads), angles.cos(), angles.sin())]


def _how(family: str) -> Rotation:
    found = rotation_of(_function(family))
    assert found is not None
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["llama", "phi3", "cohere", "olmo2"])
def test_as_the_function(rng: torch.Generator, family: str, dtype: torch.dtype) -> None:
    """In 16 bits, not further from float32 than the function."""
    how = _how(family)
    for batch, tokens in ((1, 1), (3, 1), (2, 2), (1, 7), (1, 64)):
        given = _tensors(rng, dtype, batch, tokens, turned=8 if how.partial else 16)
        got, own = rotated(how, *given), how.function(*given)
        assert got is not None
        exact = how.function(*(one.float() for one in given))
        for one, other, truth in zip(got, own, exact, strict=True):
            assert one.shape == other.shape
            assert one.dtype == other.dtype
            error = float((one.float() - truth).norm())
            assert error <= max(float((other.float() - truth).norm()) * 1.01, 1e-6 * float(truth.norm()))


def test_angles_in_float32_of_queries_in_16_bits(rng: torch.Generator) -> None:
    query, key, cos, sin = _tensors(rng, torch.float32)
    given = (query.bfloat16(), key.bfloat16(), cos, sin)
    assert rotated(_how("llama"), *given) is None  # gives float32
    how = _how("olmo2")
    got = rotated(how, *given)
    assert got is not None
    for one, other in zip(got, how.function(*given), strict=True):
        torch.testing.assert_close(one, other, rtol=2**-7, atol=1e-6)


def test_angles_of_all_sequences(rng: torch.Generator) -> None:
    query, key, cos, sin = _tensors(rng, torch.float32)
    given = (query, key, cos[:1], sin[:1])
    got = rotated(_how("llama"), *given)
    assert got is not None
    for one, other in zip(got, _how("llama").function(*given), strict=True):
        torch.testing.assert_close(one, other)


class _Tagged(torch.Tensor):
    """A subclass that changes nothing."""


@pytest.mark.parametrize("index", range(4))
def test_tensors_that_need_the_function(rng: torch.Generator, index: int) -> None:
    how = _how("llama")
    given = _tensors(rng, torch.float32)
    assert rotated(how, *given) is not None
    for change in (
        lambda x: x.clone().requires_grad_(),
        lambda x: x.as_subclass(_Tagged),
        lambda x: x.to("meta"),
        lambda x: x.bfloat16(),
        lambda x: x.double(),
        lambda x: x[..., :8],
        lambda x: x[..., :1],
        lambda x: x[0],
    ):
        other = list(given)
        other[index] = change(given[index])
        assert rotated(how, *other) is None
    with torch.no_grad():
        given[index].requires_grad_()
        assert rotated(how, *given) is not None


def test_modes_that_need_the_function(rng: torch.Generator) -> None:
    how = _how("llama")
    given = _tensors(rng, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert rotated(how, *given) is None
    with forward_ad.dual_level():
        assert rotated(how, *given) is None
    seen = []
    torch.func.vmap(lambda x: seen.append(rotated(how, x, *given[1:])) or x)(given[0][None])
    assert seen == [None]
    assert rotated(how, *_tensors(rng, torch.float32, size=2048, turned=2048)) is None
    assert rotated(how, *_tensors(rng, torch.float32, turned=8)) is None  # which the function refuses


# --- models ----------------------------------------------------------------------------------------------


@pytest.fixture
def pair(llama: Any) -> tuple[Any, Any]:
    fused = copy.deepcopy(llama)
    fuse_modules(fused)
    return llama, fused


def test_a_padded_batch(pair: tuple[Any, Any], calls: Calls) -> None:
    """Sequences of other lengths, padded on the left: places differ by row."""
    ids = token_ids(9, 3)
    mask = torch.ones_like(ids)
    for row, length in enumerate((0, 2, 5)):
        mask[row, :length] = 0
    tokens = [
        model.generate(
            ids, attention_mask=mask, do_sample=False, max_new_tokens=8, min_new_tokens=8, pad_token_id=0
        )
        for model in pair
    ]
    assert torch.equal(*tokens)
    assert calls.rotations == 2 * 8


def test_a_static_cache(pair: tuple[Any, Any], calls: Calls) -> None:
    logits = []
    for model in pair:
        cache = transformers.StaticCache(config=model.config, max_cache_len=16)
        with torch.no_grad():
            model(token_ids(5), past_key_values=cache)
            logits.append(model(token_ids(1), past_key_values=cache).logits)
    assert_same(logits[1], logits[0])
    assert calls.rotations == 4


def test_gradients(pair: tuple[Any, Any], calls: Calls) -> None:
    given = pair[0].get_input_embeddings()(token_ids()).detach().requires_grad_()
    grads = [
        torch.autograd.grad(model(inputs_embeds=given, use_cache=False).logits.sum(), given)[0]
        for model in pair
    ]
    assert torch.equal(*grads)
    assert calls.rotations == 0


def test_a_function_that_was_replaced(
    pair: tuple[Any, Any], calls: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What other libraries put in its place is called."""
    module = importlib.import_module("transformers.models.llama.modeling_llama")
    monkeypatch.setattr(module, "apply_rotary_pos_emb", _other_way)
    with torch.no_grad():
        own, fused = (model(token_ids()).logits for model in pair)
    assert_same(fused, own)
    assert calls.rotations == 0


def test_compiled_for_any_length(pair: tuple[Any, Any]) -> None:
    """The operator is in the graph, once in a layer, and there is one graph for all lengths."""
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(pair[1], backend=backend, fullgraph=True, dynamic=True)
    for length in (5, 9, 12):
        with torch.no_grad():
            logits = compiled(token_ids(length), use_cache=False).logits
            assert_same(logits, pair[0](token_ids(length)).logits)
    assert len(graphs) == 1
    assert sum("littlebit2.rotary" in str(node.target) for node in graphs[0].graph.nodes) == 2


def test_a_call_within_a_branch(calls: Calls) -> None:
    """Cohere 2 rotates in layers with a window alone."""
    config = transformers.Cohere2Config(
        vocab_size=160,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
        pad_token_id=0,
    )
    torch.manual_seed(0)
    own = quantized_copy(transformers.Cohere2ForCausalLM(config).eval())
    fused = copy.deepcopy(own)
    fuse_modules(fused)
    with torch.no_grad():
        assert_same(fused(token_ids()).logits, own(token_ids()).logits)
    assert calls.rotations == 1


def test_families_with_norms_before(calls: Calls) -> None:
    """Qwen 3 normalizes queries and keys before they turn."""
    model = quantized_copy(dense_model("qwen3"))
    fuse_modules(model)
    with torch.no_grad():
        model(token_ids())
    assert calls.rotations == 2
