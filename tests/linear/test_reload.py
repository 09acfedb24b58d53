"""Loading a state while other threads run the layer."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from littlebit2.quantize import QuantConfig, quantize_weight
from littlebit2_kernels import LittleBitLinear


def layer_of(rng: torch.Generator) -> LittleBitLinear:
    weight = torch.randn(96, 64, generator=rng)
    return LittleBitLinear.from_packed(quantize_weight(weight, config=QuantConfig(ranks=(16,))).packed)


def elsewhere(call: Any) -> Any:
    """The result of a call on another thread."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(call()))
    thread.start()
    thread.join()
    return results[0]


def test_a_call_in_the_middle_of_loading_finds_the_layer_as_it_was(
    rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, other = layer_of(rng), layer_of(rng)
    x = torch.randn(8, 64, generator=rng)
    before, after = layer(x), other(x)
    assert not torch.equal(before, after)
    seen: list[torch.Tensor] = []
    original = LittleBitLinear._normalize

    def serving(self: LittleBitLinear, *args: Any) -> None:
        seen.append(elsewhere(lambda: layer(x)))
        original(self, *args)

    state = other.state_dict()
    monkeypatch.setattr(LittleBitLinear, "_normalize", serving)
    layer.load_state_dict(state)
    (during,) = seen
    assert torch.equal(during, before)
    assert torch.equal(layer(x), after)


def test_many_loads_while_threads_serve(rng: torch.Generator) -> None:
    layer, other = layer_of(rng), layer_of(rng)
    x = torch.randn(8, 64, generator=rng)
    states = [layer.state_dict(), other.state_dict()]
    states = [{name: tensor.clone() for name, tensor in state.items()} for state in states]
    expected = [layer(x), other(x)]
    stop, bad = threading.Event(), []

    def serve() -> None:
        while not stop.is_set():
            try:
                y = layer(x)
            except Exception as error:  # any is a failure
                bad.append(repr(error))
                return
            if not any(torch.equal(y, one) for one in expected):
                bad.append("neither the old layer nor the new one")
                return

    threads = [threading.Thread(target=serve) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for number in range(300):
            layer.load_state_dict(states[number % 2])
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not bad


def test_a_bad_state_leaves_the_layer_as_it_was(rng: torch.Generator) -> None:
    layer = layer_of(rng)
    x = torch.randn(8, 64, generator=rng)
    before = layer(x)
    state = layer.state_dict()
    with pytest.raises(RuntimeError, match="must have shape"):
        layer.load_state_dict({**state, "u1": torch.ones(1, 5)})
    assert torch.equal(layer(x), before)
