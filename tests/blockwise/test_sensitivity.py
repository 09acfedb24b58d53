"""What the model's output feels of errors in hidden states."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from littlebit2.blockwise.text import load_tokenizer, sequences
from littlebit2.blockwise.tuning.sensitivity import mean_squares, mixed
from tests.blockwise.builders import QUICK, run, write_data, write_model


def test_few_tokens_do_not_own_the_mean(rng: torch.Generator) -> None:
    gradients = torch.randn(50, 6, generator=rng)
    found = mean_squares(gradients)
    assert float(found.mean()) == pytest.approx(1)
    gradients[3] *= 1e6
    clipped = mean_squares(gradients)
    assert float((clipped - found).norm() / found.norm()) < 0.5


def test_without_gradients_all_channels_are_alike() -> None:
    assert torch.equal(mean_squares(torch.zeros(5, 3)), torch.ones(3))


def test_gradients_must_be_finite(rng: torch.Generator) -> None:
    gradients = torch.randn(5, 3, generator=rng)
    gradients[1, 2] = float("nan")
    with pytest.raises(
        ValueError, match=r"finite gradients, got NaN or infinity at the output of h\.3: use sensitivity 0"
    ):
        mean_squares(gradients, "h.3")


def test_mixture_with_the_squared_error(rng: torch.Generator) -> None:
    squares = mean_squares(torch.randn(9, 4, generator=rng))
    assert torch.equal(mixed(squares, 0.0), torch.ones(4))
    assert torch.equal(mixed(squares, 1.0), squares)
    assert torch.allclose(mixed(squares, 0.25), 0.25 * squares + 0.75)


@pytest.mark.parametrize("family", ["qwen2", "gemma3"])
def test_block_by_block_as_through_the_whole_model(family: str, tmp_path: Path) -> None:
    path, data = write_model(tmp_path / "dense", family), write_data(tmp_path / "text.txt")
    run(path, tmp_path / "out", data, changes={"steps": 1, "sensitivity_samples": 6}, keep_work=True)
    text = {name: QUICK[name] for name in ("length", "samples", "held_out")}
    ids = sequences(tmp_path / "tokens", [data], load_tokenizer(path), seed=0, **text)[:6]
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    blocks = model.get_decoder().layers
    generator = torch.Generator().manual_seed(0)
    weighted: list[list[torch.Tensor]] = [[] for _ in blocks]
    outputs: list[torch.Tensor] = []
    for block in blocks:
        block.register_forward_hook(lambda _, __, made: outputs.append(made))
    for row in ids:
        outputs.clear()
        logits = model(input_ids=row.unsqueeze(0), use_cache=False).logits[0]
        states = [made[0] if isinstance(made, tuple) else made for made in outputs]
        chosen = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)
        nll = -logits.log_softmax(-1).gather(1, chosen).sum()
        for index, gradient in enumerate(torch.autograd.grad(nll, states)):
            weighted[index].append((gradient * states[index].norm(dim=-1, keepdim=True))[0].detach())
    found = load_file(tmp_path / "out.partial" / "channels.sensitivity")
    assert len(found) == len(weighted)
    for index, parts in enumerate(weighted):
        expected = mean_squares(torch.cat(parts))
        torch.testing.assert_close(found[str(index)], expected, rtol=1e-2, atol=1e-2)
