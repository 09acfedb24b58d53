"""Steps of fused models in one call: the tokens of the calls apart, and where these have to be made."""

from __future__ import annotations

import copy
import gc
import itertools
from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache

import littlebit2
from littlebit2.architecture.decoder import fuse_modules, unfuse_modules
from littlebit2.architecture.decoder.step import STEP
from littlebit2.integrations.decoding import StaticDecoder, step
from littlebit2.integrations.decoding import attention as implementation
from littlebit2.integrations.decoding import cache as growing
from littlebit2.integrations.decoding.cache import grow_caches_of
from tests.integrations.families import FAMILIES, assert_same, dense_model, quantized_copy, token_ids

#: Families, what differs from the table, and layers of a model that a step computes: with a growing cache,
#: and with one of fixed size, of which those with a window are the library's.
CASES: dict[str, tuple[str, dict[str, Any], int, int]] = {
    "llama": ("llama", {}, 2, 2),
    "llama-mqa": ("llama", {"num_key_value_heads": 1}, 2, 2),
    "qwen2": ("qwen2", {}, 2, 2),
    "qwen3": ("qwen3", {}, 2, 2),
    "gemma2": ("gemma2", {"sliding_window": 9, "attn_logit_softcapping": 2.0}, 2, 1),
    "gemma3": ("gemma3", {"sliding_window": 9}, 2, 0),
    "phi3": ("phi3", {"sliding_window": 9}, 2, 0),
    "opt": ("opt", {}, 0, 0),
}


class Steps:
    """Counts steps, and lets them be or not."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        self._patch = monkeypatch
        kernel = step.attention_step

        def counting(*arguments: Any) -> torch.Tensor:
            self.count += 1
            return kernel(*arguments)

        monkeypatch.setattr(step, "attention_step", counting)

    def apart(self) -> None:
        """From now on, everything is called by itself."""
        self._patch.delattr(implementation.attention_forward, STEP)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Steps:
    return Steps(monkeypatch)


def model_of(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A tiny packed model as ``load`` leaves it."""
    family, change, *_ = CASES[name]
    config, sizes, kind = FAMILIES[family]
    monkeypatch.setitem(FAMILIES, family, (config, {**sizes, **change}, kind))
    model = quantized_copy(dense_model(family))
    assert implementation.choose(model)
    grow_caches_of(model)
    fuse_modules(model)
    with torch.no_grad():
        model(token_ids(3))  # packed layers take their own layout in their first call
    return model


@pytest.fixture
def llama(monkeypatch: pytest.MonkeyPatch) -> Any:
    return model_of("llama", monkeypatch)


def padded(rows: int = 3) -> dict[str, torch.Tensor]:
    """Prompts of different lengths, padded on the left."""
    ids = token_ids(9, rows)
    mask = torch.ones_like(ids)
    for row in range(rows):
        mask[row, : 2 * row] = 0
    return {"input_ids": ids, "attention_mask": mask}


def cache_of(model: Any, kind: str) -> Any:
    if kind == "static":
        return StaticCache(config=model.config, max_cache_len=40)
    return DynamicCache(config=model.config)


def decoded(model: Any, cache: Any, *, prompt: int = 7) -> torch.Tensor:
    """Logits ``[1, ...]`` of steps after a prompt: of one token, of three, and of one again."""
    ids = token_ids(prompt + 6)
    found = []
    with torch.no_grad():
        for begin, end in ((0, prompt), *((prompt + i, prompt + i + 1) for i in range(2))):
            found.append(model(ids[:, begin:end], past_key_values=cache).logits)
        found.append(model(ids[:, prompt + 2 : prompt + 5], past_key_values=cache).logits)
        found.append(model(ids[:, prompt + 5 :], past_key_values=cache).logits)
    return torch.cat(found, 1)


@pytest.mark.parametrize("kind", ["growing", "static"])
@pytest.mark.parametrize("name", CASES)
def test_the_bits_of_the_calls_apart(
    name: str, kind: str, steps: Steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(name, monkeypatch)
    layers = CASES[name][2 if kind == "growing" else 3]
    got = decoded(model, cache_of(model, kind))
    assert steps.count == 4 * layers
    steps.apart()
    assert torch.equal(got, decoded(model, cache_of(model, kind)))
    assert steps.count == 4 * layers


@pytest.mark.parametrize("block", [64, 2])
@pytest.mark.parametrize("name", CASES)
def test_the_tokens_of_modules_that_are_not_fused(
    name: str, block: int, steps: Steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Greedy, in float32, with padding; past the windows, and past what a small buffer has room for."""
    monkeypatch.setattr(growing, "_BLOCK", block)
    model = model_of(name, monkeypatch)
    settings: dict[str, Any] = {"max_new_tokens": 50, "min_new_tokens": 50, "do_sample": False}
    got = model.generate(**padded(), **settings)
    most = 49 * CASES[name][2]
    assert steps.count == most if block == 64 else most * 0.7 < steps.count < most or most == 0
    unfuse_modules(model)
    steps.count = 0
    assert torch.equal(got, model.generate(**padded(), **settings))
    assert steps.count == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits(dtype: torch.dtype, steps: Steps, llama: Any) -> None:
    llama.to(dtype)
    got = decoded(llama, cache_of(llama, "growing"))
    assert steps.count == 8
    steps.apart()
    assert torch.equal(got, decoded(llama, cache_of(llama, "growing")))


def test_what_load_makes_and_generate_does(steps: Steps, llama: Any, tmp_path: Any) -> None:
    from littlebit2.integrations.transformers import attach

    unfuse_modules(llama)
    attach(llama)
    llama.save_pretrained(tmp_path / "model")
    model = littlebit2.load(tmp_path / "model")
    for cache in ("dynamic", "static"):
        steps.count = 0
        made = littlebit2.generate(model, token_ids(7)[0], max_new_tokens=9, ignore_eos=True, cache=cache)
        assert steps.count == 2 * 8
        unfused = copy.deepcopy(model)
        unfuse_modules(unfused)
        assert made.token_ids == tuple(
            unfused.generate(token_ids(7), max_new_tokens=9, min_new_tokens=9, do_sample=False)[
                0, 7:
            ].tolist()
        )


def test_a_full_static_cache_is_an_error(llama: Any, steps: Steps) -> None:
    cache = StaticCache(config=llama.config, max_cache_len=8)
    with torch.no_grad():
        llama(token_ids(7), past_key_values=cache)
        llama(token_ids(1), past_key_values=cache)
        assert steps.count == 2
        with pytest.raises(RuntimeError, match="position must be between 0 and 7, got 8"):
            llama(token_ids(1), past_key_values=cache)


def test_caches_that_are_cropped_copied_and_reordered(llama: Any, steps: Steps) -> None:
    """What a cache holds after a step is what the calls apart leave there, and goes on the same way."""

    def run() -> list[torch.Tensor]:
        found = []
        ids = token_ids(16, 2)
        cache = cache_of(llama, "growing")
        with torch.no_grad():
            llama(ids[:, :6], past_key_values=cache)
            llama(ids[:, 6:7], past_key_values=cache)
            seen = [(layer.keys, layer.keys.clone()) for layer in cache.layers]
            twin, shallow = copy.deepcopy(cache), copy.copy(cache)
            shallow.layers = [copy.copy(layer) for layer in cache.layers]
            for index, one in enumerate((cache, twin, shallow, cache)):
                found.append(llama(ids[:, 7 + index : 8 + index], past_key_values=one).logits)
            cache.crop(-3)
            found.append(llama(ids[:, 11:12], past_key_values=cache).logits)
            cache.reorder_cache(torch.tensor([1, 1]))
            cache.batch_select_indices(torch.tensor([0]))
            found += [llama(ids[:1, i : i + 1], past_key_values=cache).logits for i in (12, 13)]
        assert all(torch.equal(one, before) for one, before in seen)
        for one in (cache, twin, shallow):
            found += [rows.clone() for layer in one.layers for rows in (layer.keys, layer.values)]
        return found

    got = run()
    assert steps.count > 8
    steps.apart()
    assert all(map(torch.equal, got, run()))


def test_inference_mode_and_back(llama: Any, steps: Steps) -> None:
    for kind in ("growing", "static"):
        cache = cache_of(llama, kind)
        with torch.inference_mode():
            llama(token_ids(7), past_key_values=cache)
            llama(token_ids(1), past_key_values=cache)
        before = steps.count
        with torch.no_grad():
            if kind == "static":
                with pytest.raises(RuntimeError, match=r"inference|Inference"):
                    llama(token_ids(1), past_key_values=cache)
            else:
                llama(token_ids(1), past_key_values=cache)
        assert steps.count == before
    assert steps.count == 4


def test_writes_are_seen_by_autograd(llama: Any) -> None:
    """A step writes where a backward pass may still read, and says so."""
    cache = cache_of(llama, "static")
    with torch.no_grad():
        llama(token_ids(7), past_key_values=cache)
    weight = torch.ones((), requires_grad=True)
    loss = (cache.layers[0].keys * weight).sum()
    with torch.no_grad():
        llama(token_ids(1), past_key_values=cache)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


_WHY = ("update of the cache", "update of layers", "implementation", "rotation")


@pytest.mark.parametrize(
    ("why", "kind"), [*itertools.product(_WHY, ("growing", "static")), ("autocast", "growing")]
)
def test_where_the_calls_have_to_be_made(
    why: str, kind: str, llama: Any, steps: Steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = cache_of(llama, kind)
    with torch.no_grad():
        llama(token_ids(7), past_key_values=cache)
        llama(token_ids(1), past_key_values=cache)
    assert steps.count == 2
    calls: list[str] = []
    if why == "implementation":
        llama.set_attn_implementation("sdpa")
    elif why == "rotation":
        from transformers.models.llama import modeling_llama

        own = modeling_llama.apply_rotary_pos_emb
        monkeypatch.setattr(
            modeling_llama, "apply_rotary_pos_emb", lambda *given: calls.append(why) or own(*given)
        )
    elif why.startswith("update"):
        changed = [cache] if why.endswith("cache") else cache.layers
        for one in changed:

            def update(*given: Any, _own: Any = one.update, **more: Any) -> Any:
                calls.append(why)
                return _own(*given, **more)

            one.update = update
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=why == "autocast"):
        llama(token_ids(1), past_key_values=cache)
    assert steps.count == 2
    assert len(calls) == 2 * (why == "rotation" or why.startswith("update"))


def test_gradients_are_not_lost(llama: Any, steps: Steps) -> None:
    ids = token_ids(7)
    found = []
    for fused in (True, False):
        if not fused:
            unfuse_modules(llama)
        cache = cache_of(llama, "growing")
        with torch.no_grad():
            llama(ids[:, :6], past_key_values=cache)
        given = llama.get_input_embeddings()(ids[:, 6:]).detach().requires_grad_()
        loss = llama(inputs_embeds=given, past_key_values=cache).logits.sum()
        found.append(torch.autograd.grad(loss, given)[0])
    assert_same(*found)
    assert steps.count == 0


def test_compiled_steps_hold_the_operator(llama: Any) -> None:
    """A static cache in a compiled program: the operator is there once in a layer, no other rotates."""
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    wanted = decoded(llama, cache_of(llama, "static"))
    cache, ids = cache_of(llama, "static"), token_ids(13)
    compiled = torch.compile(llama, backend=backend)
    with torch.no_grad():
        llama(ids[:, :7], past_key_values=cache)
        got = torch.cat([compiled(ids[:, i : i + 1], past_key_values=cache).logits for i in (7, 8)], 1)
    torch.testing.assert_close(got, wanted[:, 7:9], atol=1e-4, rtol=1e-4)
    targets = [str(node.target) for graph in graphs for node in graph.graph.nodes]
    assert sum("littlebit2.attention_step" in name for name in targets) == 2 * len(graphs)
    assert not any("littlebit2.rotary" in name or "littlebit2.attention." in name for name in targets)


def test_steps_compiled_whole(llama: Any) -> None:
    """The static decoder's compiled steps, buffers written in place: the tokens of its steps by Python."""
    torch._dynamo.reset()
    ids = token_ids(7)
    found = []
    for kind in ("eager", "compile"):
        decoder = StaticDecoder(llama, 20, step=kind)
        tokens = [decoder.prefill(ids).argmax(-1)]
        for _ in range(6):
            tokens.append(decoder.step(tokens[-1]).argmax(-1).clone())
        found.append(torch.stack(tokens))
    assert torch.equal(*found)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    # What Dynamo put into the decoder's module goes with it.
    del decoder
    torch._dynamo.reset()
    gc.collect()
