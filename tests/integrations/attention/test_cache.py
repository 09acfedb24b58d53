"""Caches that grow in buffers: every operation of the library's layers has the same result on ours."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from littlebit2.integrations.decoding.cache import (
    GrowingLayer,
    GrowingSlidingWindowLayer,
    grow,
    grow_caches_of,
)
from tests.integrations.families import dense_model


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def rows(
    rng: torch.Generator, tokens: int, batch: int = 2, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    return torch.randn(batch, 3, tokens, 8, generator=rng).to(dtype)


def layers_of(kind: str):
    if kind == "full":
        return DynamicLayer(), GrowingLayer()
    return DynamicSlidingWindowLayer(sliding_window=9), GrowingSlidingWindowLayer(sliding_window=9)


def update(rng, theirs, ours, tokens, batch=2):
    keys, values = rows(rng, tokens, batch), rows(rng, tokens, batch)
    for one, other in zip(theirs.update(keys, values), ours.update(keys, values), strict=True):
        assert torch.equal(one, other)
    same(theirs, ours)


def same(theirs, ours):
    assert torch.equal(theirs.keys, ours.keys)
    assert torch.equal(theirs.values, ours.values)
    assert theirs.get_seq_length() == ours.get_seq_length()
    assert theirs.get_mask_sizes(2) == ours.get_mask_sizes(2)


@pytest.mark.parametrize("kind", ["full", "sliding"])
def test_updates_write_into_a_buffer(kind, rng):
    theirs, ours = layers_of(kind)
    update(rng, theirs, ours, 5)
    buffer = ours._buffer._buffers[0]
    for tokens in [1] * 40 + [3]:
        update(rng, theirs, ours, tokens)
    assert ours._buffer._buffers[0] is buffer
    for _ in range(100):
        update(rng, theirs, ours, 1)
    assert ours._buffer._buffers[0] is not buffer
    update(rng, theirs, ours, 200)
    update(rng, theirs, ours, 1)


@pytest.mark.parametrize("kind", ["full", "sliding"])
def test_every_change_of_the_library(kind, rng):
    theirs, ours = layers_of(kind)
    update(rng, theirs, ours, 4)
    changes = [
        lambda layer: layer.reorder_cache(torch.tensor([1, 1])),
        lambda layer: layer.crop(-2),
        lambda layer: layer.batch_repeat_interleave(2),
        lambda layer: layer.batch_select_indices(torch.tensor([3, 0])),
        lambda layer: layer.offload(),
        lambda layer: layer.prefetch(),
        lambda layer: layer.reset(),
    ]
    for change in changes:
        change(theirs)
        change(ours)
        if ours.is_initialized:
            same(theirs, ours)
        batch = ours.keys.shape[0] if ours.is_initialized else 2
        update(rng, theirs, ours, 1, batch)
        update(rng, theirs, ours, 1, batch)


def test_cropping_a_window_that_records(rng):
    theirs, ours = layers_of("sliding")
    for layer in (theirs, ours):
        layer.activate_past_recording()
    for tokens in (7, 4, 6, 1, 30, 5):
        update(rng, theirs, ours, tokens)
        for layer in (theirs, ours):
            layer.crop(-2)
        same(theirs, ours)


def test_rows_after_a_crop_go_to_another_buffer_once(rng):
    _, layer = layers_of("full")
    layer.update(rows(rng, 6), rows(rng, 6))
    layer.crop(-3)
    layer.update(rows(rng, 1), rows(rng, 1))
    buffer = layer._buffer._buffers[0]
    layer.update(rows(rng, 1), rows(rng, 1))
    assert layer._buffer._buffers[0] is buffer
    assert layer.keys.shape[2] == 5


def test_what_others_put_in_is_taken_over(rng):
    _, layer = layers_of("full")
    layer.update(rows(rng, 6), rows(rng, 6))
    layer.keys, layer.values = layer.keys[:, :, :2], layer.values[:, :, :2] * 2
    keys, values, new = layer.keys.clone(), layer.values.clone(), rows(rng, 1)
    got = layer.update(new, new)
    assert torch.equal(got[0], torch.cat([keys, new], 2))
    assert torch.equal(got[1], torch.cat([values, new], 2))


def test_copies_are_apart(rng):
    _, layer = layers_of("full")
    layer.update(rows(rng, 6), rows(rng, 6))
    twin = copy.deepcopy(layer)
    one, other = rows(rng, 1), rows(rng, 1)
    layer.update(one, one)
    twin.update(other, other)
    assert torch.equal(layer.keys[:, :, 6:], one)
    assert torch.equal(twin.keys[:, :, 6:], other)


def test_a_buffer_of_inference_mode_is_used_outside(rng):
    theirs, ours = layers_of("full")
    with torch.inference_mode():
        update(rng, theirs, ours, 6)
    update(rng, theirs, ours, 1)


def test_gradients_and_other_dtypes_are_concatenated(rng):
    _, layer = layers_of("full")
    layer.update(rows(rng, 3), rows(rng, 3))
    new = rows(rng, 1).requires_grad_()
    with torch.enable_grad():
        keys, _ = layer.update(new, new)
        (gradient,) = torch.autograd.grad(keys.sum(), new)
    assert torch.equal(gradient, torch.ones_like(new))
    theirs, ours = layers_of("full")
    for one in (theirs, ours):
        one.update(rows(rng, 3), rows(rng, 3))
        one.update(rows(rng, 1, dtype=torch.float64), rows(rng, 1, dtype=torch.float64))
    assert ours.keys.dtype == theirs.keys.dtype


def test_another_batch_is_an_error_as_in_the_library(rng):
    _, layer = layers_of("full")
    layer.update(rows(rng, 3), rows(rng, 3))
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        layer.update(rows(rng, 1, batch=1), rows(rng, 1, batch=1))


def test_caches_of_a_model(rng):
    model = dense_model("gemma3")
    grow_caches_of(model)
    ids = torch.randint(3, 160, (1, 5), generator=rng)
    with torch.no_grad():
        for cache in (DynamicCache(), DynamicCache(config=model.config)):
            model(ids, past_key_values=cache)
            assert {type(layer) for layer in cache.layers} <= {GrowingLayer, GrowingSlidingWindowLayer}
            before = cache.layers[0].keys.data_ptr()
            model(ids[:, :1], past_key_values=cache)
            assert cache.layers[0].keys.data_ptr() == before


def test_a_cache_that_holds_something_goes_on(rng):
    cache = DynamicCache()
    keys = rows(rng, 4)
    cache.update(keys, keys, 0)
    grow(cache)
    new = rows(rng, 1)
    assert torch.equal(cache.update(new, new, 0)[0], torch.cat([keys, new], 2))
    assert type(cache.layers[0]) is GrowingLayer
    cache.update(new, new, 1)
    assert type(cache.layers[1]) is GrowingLayer


@pytest.mark.parametrize("kind", ["full", "sliding"])
def test_rows_that_were_seen_are_not_written_again(kind, rng):
    _, layer = layers_of(kind)
    layer.record_past = True
    for tokens in (5, 1, 1):
        layer.update(rows(rng, tokens), rows(rng, tokens))
    seen, copied = layer.keys, layer.keys.clone()
    layer.crop(-3)
    layer.update(rows(rng, 2), rows(rng, 2))
    assert torch.equal(seen, copied)


@pytest.mark.parametrize("kind", ["full", "sliding"])
def test_shallow_copies_go_on_apart(kind, rng):
    theirs, ours = layers_of(kind)
    update(rng, theirs, ours, 5)
    copies = copy.copy(theirs), copy.copy(ours)
    for pair in (copies, (theirs, ours), copies, (theirs, ours)):
        update(rng, *pair, 1)
    same(theirs, ours)
    same(*copies)


def test_backward_passes_over_several_steps(rng):
    _, layer = layers_of("full")
    query = rows(rng, 1).requires_grad_()
    with torch.enable_grad():
        total = 0
        for tokens in (4, 1, 1):
            keys, values = layer.update(rows(rng, tokens), rows(rng, tokens))
            total = total + torch.nn.functional.scaled_dot_product_attention(query, keys, values).sum()
        (gradient,) = torch.autograd.grad(total, query)
    assert gradient.isfinite().all()
