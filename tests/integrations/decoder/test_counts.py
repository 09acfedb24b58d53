"""Operators of a decoding step in one layer, before and after fusing (docs/architecture.md)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

from littlebit2.architecture.decoder import fuse_modules
from littlebit2.integrations.decoding.attention import choose
from littlebit2.integrations.decoding.cache import grow_caches_of
from tests.integrations.families import dense_model, quantized_copy, token_ids

#: Operators of a layer that compute something (no views), those of this package among them: before, after.
COUNTS = {
    "llama": ((36, 7), (7, 4)),
    "qwen3": ((48, 7), (19, 4)),
    "gemma2": ((65, 7), (36, 4)),
    "phi3": ((35, 4), (7, 4)),
    "opt": ((15, 6), (9, 3)),
}
#: The same of models as `load` leaves them, with this package's attention and caches: fused.
LOADED = {"llama": (4, 4), "qwen3": (16, 4), "gemma2": (20, 4), "phi3": (4, 4), "opt": (9, 4)}
_VIEWS = ("view", "transpose", "expand", "unsqueeze", "slice", "alias", "t", "split", "select", "as_strided")


class _Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.all = self.own = 0

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = operator.overloadpacket.__name__
        self.all += name not in _VIEWS
        self.own += operator.namespace == "littlebit2"
        return operator(*args, **(kwargs or {}))


def _of_a_layer(model: Any) -> tuple[int, int]:
    """Operators of a step of the model less those of the model without its last layer."""
    counts = []
    decoder = model.get_decoder()
    layers = decoder.layers
    try:
        for number in (2, 1):
            decoder.layers = layers[:number]
            model.config.num_hidden_layers = number
            cache = DynamicCache(config=model.config)
            with torch.no_grad():
                model(token_ids(), past_key_values=cache)
                with _Count() as count:
                    model(token_ids(1), past_key_values=cache)
            counts.append((count.all, count.own))
    finally:
        decoder.layers = layers
        model.config.num_hidden_layers = 2
    return counts[0][0] - counts[1][0], counts[0][1] - counts[1][1]


@pytest.mark.parametrize("family", COUNTS)
def test_operators_of_a_layer(family: str) -> None:
    model = quantized_copy(dense_model(family))
    before = _of_a_layer(model)
    fuse_modules(model)
    assert (before, _of_a_layer(model)) == COUNTS[family]


@pytest.mark.parametrize("family", LOADED)
def test_operators_of_a_layer_of_a_loaded_model(family: str) -> None:
    model = quantized_copy(dense_model(family))
    assert choose(model)
    grow_caches_of(model)
    fuse_modules(model)
    assert _of_a_layer(model) == LOADED[family]
