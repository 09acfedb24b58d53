"""``StaticDecoder``: the tokens of ``generate``, however a step runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import littlebit2
from littlebit2.integrations.decoding import StaticDecoder
from littlebit2.integrations.decoding import static as decoding
from littlebit2.integrations.transformers import attach
from littlebit2_kernels import LittleBitLinear, fuse_linears
from tests.integrations.families import GENERATIVE, dense_model, greedy, quantized_copy, token_ids


@pytest.fixture(scope="module")
def model() -> Any:
    return quantized_copy(dense_model("llama"))


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Graphs on the CPU: a capture runs nothing, a replay runs what was captured. Counts replays."""
    replays: list[int] = []

    def capture(run: Callable[[], None], restore: Callable[[], None]) -> Callable[[], None]:
        for _ in range(3):
            run()
            restore()
        replays.append(0)

        def replay() -> None:
            replays[-1] += 1
            run()

        return replay

    monkeypatch.setattr(decoding, "capture", capture)
    monkeypatch.setattr(decoding, "no_graph_reason", lambda model: None)
    return replays


def _greedy_steps(decoder: StaticDecoder, ids: torch.Tensor, count: int = 16) -> list[list[int]]:
    ends = decoder.model.generation_config.eos_token_id
    logits = decoder.prefill(ids).clone()
    tokens = []
    while True:
        logits = logits.clone()
        logits[:, ends] = -torch.inf
        tokens.append(logits.argmax(-1))
        if len(tokens) == count:
            return torch.stack(tokens, 1).tolist()
        logits = decoder.step(tokens[-1])


@pytest.mark.parametrize("step", ["eager", "graph"])
def test_tokens_are_those_of_generate(model: Any, graphs: list[int], step: str) -> None:
    decoder = StaticDecoder(model, 40, step=step)
    for length in (12, 5, 24):  # the decoder serves one prompt after another
        ids = token_ids(length)
        assert _greedy_steps(decoder, ids) == [greedy(model, ids)]
        assert decoder.length == length + 15
    assert graphs == ([45] if step == "graph" else [])  # captured once


@pytest.mark.parametrize("family", [name for name in GENERATIVE if name != "llama"])
def test_every_family(family: str) -> None:
    model = quantized_copy(dense_model(family))
    ids = token_ids()
    assert _greedy_steps(StaticDecoder(model, 28), ids) == [greedy(model, ids)]


def test_rows(model: Any, graphs: list[int]) -> None:
    ids = token_ids(9, rows=3)
    expected = [greedy(model, row[None]) for row in ids]
    for step in ("eager", "graph"):
        assert _greedy_steps(StaticDecoder(model, 30, rows=3, step=step), ids) == expected


def test_compiled_step_of_a_fused_model(model: Any) -> None:
    """As a GPU runs it: fused projections, one graph for all steps."""
    for parent in model.modules():
        if hasattr(parent, "q_proj"):
            fuse_linears([parent.q_proj, parent.k_proj, parent.v_proj], on_cpu=True)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    ids = token_ids()
    decoder = StaticDecoder(model, 40, step="compile")
    assert _greedy_steps(decoder, ids) == [greedy(model, ids)]
    stats = dict(torch._dynamo.utils.counters["stats"])
    assert stats["unique_graphs"] <= 2
    assert _greedy_steps(decoder, token_ids(7)) == [greedy(model, token_ids(7))]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == stats["unique_graphs"]
    for module in model.modules():
        if isinstance(module, LittleBitLinear):
            module._group = None


def test_generate_by_steps(model: Any, tmp_path: Path, graphs: list[int]) -> None:
    attach(model)
    model.save_pretrained(tmp_path)
    ids = token_ids()[0].tolist()
    settings: dict[str, Any] = {"max_new_tokens": 12, "ignore_eos": True}
    expected = littlebit2.generate(tmp_path, ids, **settings)
    for step in ("eager", "graph"):
        seen: list[str] = []
        result = littlebit2.generate(tmp_path, ids, step=step, stream=seen.append, **settings)
        assert result.token_ids == expected.token_ids
        assert "".join(seen).split() == [str(token) for token in result.token_ids]
        assert result.tokens_per_second is not None
    loaded = littlebit2.load(tmp_path)
    draws = [
        littlebit2.generate(
            loaded,
            ids,
            step="eager",
            do_sample=True,
            temperature=1.3,
            top_p=0.9,
            seed=seed,
            max_new_tokens=12,
        ).token_ids
        for seed in (1, 1, 2)
    ]
    assert draws[0] == draws[1] != draws[2]


def test_generate_stops_at_the_end_token(model: Any) -> None:
    ids = token_ids()
    tokens = littlebit2.generate(
        model, ids[0].tolist(), step="eager", max_new_tokens=12, ignore_eos=True
    ).token_ids
    saved = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = [tokens[4], 2]
    try:
        stopped = littlebit2.generate(model, ids[0].tolist(), step="eager", max_new_tokens=12).token_ids
    finally:
        model.generation_config.eos_token_id = saved
    assert stopped == tokens[: tokens.index(tokens[4]) + 1]


def test_errors(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = token_ids()
    with pytest.raises(ValueError, match="step must be one of eager, compile, graph, got 'fast'"):
        StaticDecoder(model, 20, step="fast")
    with pytest.raises(ValueError, match="step must be one of"):
        littlebit2.generate(model, [1], step="fast")
    with pytest.raises(ValueError, match="max_length must be at least 1, got 0"):
        StaticDecoder(model, 0)
    with pytest.raises(ValueError, match="rows must be at least 1, got 0"):
        StaticDecoder(model, 8, rows=0)
    with pytest.raises(ValueError, match="it needs a model on a CUDA device, got one on cpu"):
        StaticDecoder(model, 20, step="graph")
    decoder = StaticDecoder(model, 13)
    with pytest.raises(ValueError, match=r"step\(\) must follow prefill"):
        decoder.step(torch.tensor([1]))
    for bad in (token_ids(14), token_ids(5, rows=2), torch.zeros(1, 0, dtype=torch.long), ids[0]):
        with pytest.raises(ValueError, match=r"ids must be \[1, 1 to 13\] tokens"):
            decoder.prefill(bad)
    decoder.prefill(ids)
    with pytest.raises(ValueError, match=r"tokens must have shape \[1\]"):
        decoder.step(torch.tensor([1, 2]))
    decoder.step(torch.tensor([5]))
    with pytest.raises(ValueError, match="max_length=13 tokens are in the cache"):
        decoder.step(torch.tensor([5]))
    monkeypatch.setattr(decoding, "no_graph_reason", lambda model: None)
    sliding = dense_model("gemma3")
    with pytest.raises(ValueError, match="counts its tokens on the device, and layer 0 of Gemma3ForCausalLM"):
        StaticDecoder(sliding, 20, step="graph")
