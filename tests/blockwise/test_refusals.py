"""What cannot be worked on block by block is refused before any work."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from littlebit2.blockwise import BlockwiseSettings, quantize_blockwise
from littlebit2.blockwise.check import check_blocks
from littlebit2.blockwise.find import find_blocks
from littlebit2.blockwise.pieces import ModelInPieces
from littlebit2.disk import RunError
from littlebit2.quantize import QuantConfig
from tests.blockwise.builders import SIZES, run, write_data, write_model
from tests.train.builders import byte_tokenizer, write_text


class Block(nn.Module):
    """Adds a linear map; ``kind`` says what it returns."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.proj = nn.Linear(8, 8)
        self.kind = kind

    def forward(self, hidden: torch.Tensor, other: Any = None) -> Any:
        output = hidden + self.proj(hidden)
        return {
            "tensor": output,
            "tuple": (output, None),
            "pair": (output, output),
            "extra": (output, output),
            "narrow": output[..., :4],
        }[self.kind]


class Model(nn.Module):
    """A minimal language model with what the engine asks of one."""

    def __init__(self, kind: str = "tensor", mode: str = "plain") -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.layers = nn.ModuleList(Block(kind) for _ in range(3))
        self.head = nn.Linear(8, 20)
        self.mode = mode

    def initialize_weights(self) -> None:
        pass

    def tie_weights(self) -> None:
        pass

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        hidden = first = self.embed(input_ids)
        blocks = list(self.layers)
        if self.mode == "reversed":
            blocks.reverse()
        elif self.mode == "short":
            blocks.pop()
        for block in blocks:
            other: Any = {
                "first": first,
                "hidden": hidden.mean(),
                "object": {"cache": 1},
            }.get(self.mode, 1.0)
            hidden = block(hidden, other)
            if isinstance(hidden, tuple):
                # One block's second value changes the next one's hidden state, another's is read by nobody.
                second = hidden[1] if block.kind == "pair" else None
                hidden = hidden[0] if second is None else hidden[0] + second
        return transformers.modeling_outputs.CausalLMOutput(logits=self.head(hidden))


class Values:
    """Reads a parameter of a model that has values."""

    def __init__(self, name: str, values: dict[str, torch.Tensor]) -> None:
        self.files = (name,)
        self.values = values

    def read(self, load: object) -> torch.Tensor:
        return self.values[self.files[0]]


def pieces(kind: str = "tensor", mode: str = "plain") -> ModelInPieces:
    values = Model().state_dict()
    with torch.device("meta"):
        model = Model(kind, mode)
    parts: Any = {name: Values(name, values) for name in values}
    return ModelInPieces(model, parts, lambda name: torch.empty(0), "layers", torch.device("cpu"))


@pytest.mark.parametrize("kind", ["tensor", "tuple", "extra"])
def test_plain_blocks_are_taken(kind: str) -> None:
    model = pieces(kind)
    assert check_blocks(model, 20)
    assert model.returns == {Block: None if kind == "tensor" else (None,)}


def test_arguments_that_depend_on_tokens_are_noted() -> None:
    assert not check_blocks(pieces(mode="first"), 20)


@pytest.mark.parametrize(
    ("kind", "mode", "message"),
    [
        ("pair", "plain", "return more than a hidden state"),
        ("narrow", "plain", "must return a hidden state"),
        ("tensor", "hidden", "depend on hidden states"),
        ("tensor", "object", "takes a dict"),
        ("tensor", "reversed", r"layers\.2 is called after 0 other blocks"),
        ("tensor", "short", "calls 2 of its 3 blocks"),
    ],
)
def test_other_blocks_are_refused(kind: str, mode: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"--method admm.*{message}|{message}.*--method admm"):
        check_blocks(pieces(kind, mode), 20)


def test_model_without_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="repeated blocks"):
        find_blocks(Model(), [])


def test_missing_values_are_an_error() -> None:
    with torch.device("meta"):
        model = Model()
    with pytest.raises(ValueError, match=r"none for embed\.weight"):
        ModelInPieces(model, {}, lambda name: torch.empty(0), "layers", torch.device("cpu"))


def test_model_without_head_is_refused_before_any_work(tmp_path: Path) -> None:
    sizes = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
    transformers.BertModel(transformers.BertConfig(**{**sizes, "pad_token_id": 0})).save_pretrained(
        tmp_path / "dense"
    )
    byte_tokenizer().save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match=r"causal language model, got BertModel.*--method admm"):
        run(tmp_path / "dense", tmp_path / "out", write_data(tmp_path / "text.txt"))
    assert not list(tmp_path.glob("out*"))


def test_arguments_are_checked_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = write_model(tmp_path / "dense"), write_data(tmp_path / "text.txt")
    out = tmp_path / "out"
    with pytest.raises(TypeError, match="config must be a QuantConfig"):
        quantize_blockwise(model, out, 1.0, [data])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="threads must be a positive integer or None, got 0"):
        run(model, out, data, threads=0)
    with pytest.raises(ValueError, match="spectra are not measured"):
        quantize_blockwise(model, out, QuantConfig(bpw=2.0, budget="spectral"), [data])
    with pytest.raises(FileNotFoundError, match="no such file"):
        run(model, out, tmp_path / "nothing.txt")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="one process"):
        run(model, out, data)
    assert not list(tmp_path.glob("out*"))


def test_text_must_be_long_enough(tmp_path: Path) -> None:
    short = write_text(tmp_path / "short.txt", 30)
    with pytest.raises(ValueError, match="at least 4 sequences of 16 tokens"):
        run(write_model(tmp_path / "dense"), tmp_path / "out", short)


def test_text_that_cannot_be_read_leaves_nothing_behind(tmp_path: Path) -> None:
    model, data, out = write_model(tmp_path / "dense"), tmp_path / "text.txt", tmp_path / "out"
    data.write_bytes(bytes(range(128, 256)))
    with pytest.raises(ValueError, match="must be UTF-8 text"):
        run(model, out, data)
    assert not out.with_name("out.partial").exists()
    run(model, out, write_data(data))


def test_what_differs_from_an_unfinished_run_is_named_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = write_model(tmp_path / "dense"), write_data(tmp_path / "text.txt")
    with monkeypatch.context() as broken:
        broken.setattr("littlebit2.blockwise.tuning.block.BlockRunner.run", None)
        with pytest.raises(TypeError):
            run(model, tmp_path / "out", data)
    with pytest.raises(RunError, match=r"with other settings: steps = 12 there, 13 here; finish it"):
        run(model, tmp_path / "out", data, changes={"steps": 13})


def test_less_text_than_asked_for_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, data = write_model(tmp_path / "dense"), write_data(tmp_path / "text.txt")
    run(model, tmp_path / "out", data, changes={"samples": 100_000, "steps": 1}, progress=True)
    assert re.search(r"warning: the text gives \d+ of 100000 sequences of 16 tokens", capsys.readouterr().err)


def test_tokenizer_is_needed(tmp_path: Path) -> None:
    model = write_model(tmp_path / "dense")
    (model / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="must hold a tokenizer"):
        run(model, tmp_path / "out", write_data(tmp_path / "text.txt"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": 0}, "samples must be an integer of at least 1, got 0"),
        ({"length": 1}, "length must be an integer of at least 2, got 1"),
        ({"steps": -1}, "steps must be an integer of at least 0, got -1"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"warmup": 1.0}, r"warmup must be in \[0, 1\)"),
        ({"kl_length": 1}, "kl_length must be an integer of at least 2, got 1"),
        ({"kl_samples": 0}, "kl_samples must be an integer of at least 1, got 0"),
        ({"kl_sizes": ()}, r"kl_sizes must hold positive numbers, got \(\)"),
        ({"kl_sizes": (0.5, -1)}, "kl_sizes must hold positive numbers"),
    ],
)
def test_settings_out_of_range(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BlockwiseSettings(**changes)
