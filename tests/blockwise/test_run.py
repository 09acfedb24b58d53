"""Whole runs on tiny models: what is written is what was tuned."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from littlebit2 import load
from littlebit2.blockwise import BLOCKWISE_NAME
from littlebit2.blockwise.pieces import BlockCall, ModelInPieces
from littlebit2.blockwise.text import load_tokenizer, sequences
from littlebit2.cli import main
from littlebit2.train.losses import token_nll
from tests.blockwise.builders import FAMILIES, QUICK, run, write_data, write_model
from tests.offline.builders import contents


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("text") / "text.txt")


def held_out(model: Path, data: Path, folder: Path) -> torch.Tensor:
    """The held-out sequences of a quick run."""
    ids = sequences(
        folder / "tokens",
        [data],
        load_tokenizer(model),
        length=QUICK["length"],
        samples=QUICK["samples"],
        held_out=QUICK["held_out"],
        seed=0,
    )
    return ids[-QUICK["held_out"] :]


def perplexity_of(path: Path, ids: torch.Tensor) -> float:
    model = load(path, dtype=torch.float32, activation="exact")
    with torch.no_grad():
        nll = float(token_nll(model(input_ids=ids, use_cache=False).logits, ids))
    return math.exp(nll / (ids.shape[0] * (ids.shape[1] - 1)))


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpoint_is_what_was_tuned(family: str, data: Path, tmp_path: Path) -> None:
    model = write_model(tmp_path / "dense", family)
    out = tmp_path / "out"
    report = run(model, out, data)
    ids = held_out(model, data, tmp_path)
    assert report.perplexity["dense"] == pytest.approx(perplexity_of(model, ids), rel=1e-3)
    assert report.perplexity["tuned"] == pytest.approx(perplexity_of(out, ids), rel=1e-3)
    assert report.perplexity["tuned"] != report.perplexity["dense"]
    assert report.tokens == QUICK["held_out"] * (QUICK["length"] - 1)
    assert [block["index"] for block in report.blocks] == list(range(3 if family == "gemma3" else 2))
    assert all(block["after"] <= block["before"] for block in report.blocks)
    assert any(block["after"] < 0.98 * block["before"] for block in report.blocks)
    assert json.loads((out / BLOCKWISE_NAME).read_text()) == report.as_dict()
    assert not out.with_name("out.partial").exists()
    # A further call finds the result finished.
    assert run(model, out, data).as_dict() == report.as_dict()


@pytest.mark.parametrize("family", ["qwen2", "mixtral"])
def test_distillation_of_the_whole_model(family: str, data: Path, tmp_path: Path) -> None:
    model = write_model(tmp_path / "dense", family)
    out = tmp_path / "out"
    rates = {"samples": 60, "distill_steps": 40, "distill_lr": 2e-4, "distill_scale_lr": 1e-2}
    report = run(model, out, data, changes=rates)
    assert report.distillation is not None
    assert report.distillation["after"] < report.distillation["before"]
    ids = held_out(model, data, tmp_path)
    assert list(report.perplexity) == ["dense", "tuned", "distilled"]
    assert report.perplexity["distilled"] == pytest.approx(perplexity_of(out, ids), rel=1e-3)
    assert report.final == report.perplexity["distilled"] != report.perplexity["tuned"]


def test_minutes_choose_sequences_and_steps(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_model(tmp_path / "dense")
    monkeypatch.setattr("littlebit2.blockwise.tuning.minutes.LEAST", 3)
    short = run(model, tmp_path / "short", data, changes={"minutes": 1e-9, "distill_minutes": 0.0})
    assert (short.settings["samples"], short.settings["steps"]) == (3, 3)
    # With time in plenty, the most steps are taken.
    monkeypatch.setattr("littlebit2.blockwise.tuning.minutes.MOST", 20)
    monkeypatch.setattr("littlebit2.blockwise.run.MOST", 20)
    long = run(
        model, tmp_path / "long", data, changes={"minutes": 1e6, "distill_minutes": 0.0}, keep_work=True
    )
    assert (long.settings["samples"], long.settings["steps"]) == (20, 20)
    kept = json.loads((tmp_path / "long.partial" / "chosen.json").read_text())
    assert (kept["samples"], kept["steps"]) == (20, 20)


def test_rates_far_too_high_leave_a_block_as_it_was(data: Path, tmp_path: Path) -> None:
    model = write_model(tmp_path / "dense")
    wild = run(model, tmp_path / "wild", data, changes={"lr": 1e3, "scale_lr": 1e3})
    without = run(model, tmp_path / "without", data, changes={"steps": 0})
    assert [block["after"] for block in wild.blocks] == [block["before"] for block in without.blocks]
    weights = "model.safetensors"
    assert contents(tmp_path / "wild")[weights] == contents(tmp_path / "without")[weights]


def test_same_seed_same_bytes_other_seed_others(data: Path, tmp_path: Path) -> None:
    model = write_model(tmp_path / "dense")
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(model, tmp_path / name, data, changes={"seed": seed})
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert contents(tmp_path / "a")["model.safetensors"] != contents(tmp_path / "c")["model.safetensors"]


def test_one_block_and_one_batch_at_a_time(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_model(tmp_path / "dense", num_hidden_layers=4)
    most = 0
    call = BlockCall.__call__

    def counted(self: BlockCall, block: torch.nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        nonlocal most
        most = max(most, hidden.shape[0])
        return call(self, block, hidden)

    held: list[int] = []
    load_block = ModelInPieces.load_block

    def loaded(self: ModelInPieces, index: int) -> torch.nn.Module:
        inside = self.model.get_submodule(self.blocks).parameters()
        held.append(sum(not parameter.is_meta for parameter in inside))
        return load_block(self, index)

    monkeypatch.setattr(BlockCall, "__call__", counted)
    monkeypatch.setattr(ModelInPieces, "load_block", loaded)
    run(model, tmp_path / "out", data, changes={"samples": 12}, keep_work=True)
    assert most == QUICK["batch_size"]
    assert len(held) >= 4
    assert not any(held)
    # Of all hidden states, only those after the last block are left.
    left = sorted(path.name for path in (tmp_path / "out.partial").glob("*.states"))
    assert left == ["dense-0004.states", "quantized-0004.states"]


def test_result_can_be_trained(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_model(tmp_path / "dense")
    run(model, tmp_path / "out", data)
    arguments = [
        *("finetune", str(model), str(tmp_path / "trained"), "--data", str(data)),
        *("--start", str(tmp_path / "out"), "--steps", "1", "--block", "16", "--no-tensorboard", "--quiet"),
    ]
    assert main(arguments) == 0, capsys.readouterr().err
    assert (tmp_path / "trained" / "config.json").is_file()
