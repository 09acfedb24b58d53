"""Whole runs on a tiny model: what comes out, resuming, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaModel

import littlebit2
from littlebit2.checkpoint import open_checkpoint
from littlebit2.disk import RunError
from littlebit2.quantize import QuantConfig
from littlebit2.train import pack_model, trainable_layers
from littlebit2.train.perplexity import perplexity
from littlebit2.train.recipe import FinetuneReport, Recipe, finetune, run
from littlebit2.train.recipe.student import build_student
from littlebit2_kernels import LittleBitLinear
from tests.train.builders import llama_config, write_teacher, write_text

CONFIG = QuantConfig(ranks=(16,), method="joint-itq")
RECIPE = Recipe(
    block=32,
    steps=12,
    batch_size=4,
    lr=2e-3,
    log_steps=2,
    save_steps=4,
    eval_steps=6,
    hold_out=0.1,
    quiet=True,
    keep_work=True,
)
QUICK = dataclasses.replace(RECIPE, steps=2, tensorboard=False, eval_steps=0, keep_work=False)


@dataclasses.dataclass(frozen=True)
class Case:
    """A teacher, text, and a whole run."""

    folder: Path
    teacher: Path
    data: Path
    report: FinetuneReport

    @property
    def out(self) -> Path:
        return self.folder / "whole"


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("finetune")
    teacher = write_teacher(folder / "teacher")
    data = write_text(folder / "text.txt", 6000)
    report = finetune(teacher, folder / "whole", data, CONFIG, recipe=RECIPE)
    return Case(folder, teacher, data, report)


def entries(report: FinetuneReport) -> list[dict[str, Any]]:
    """The metrics but those of the clock."""
    return [entry for entry in report.history if "train_runtime" not in entry]


def test_a_run_lowers_the_loss_and_writes_what_it_trained(case: Case) -> None:
    report = case.report
    losses = [entry for entry in report.history if "loss" in entry]
    assert [entry["step"] for entry in losses] == [2, 4, 6, 8, 10, 12]
    assert losses[-1]["loss"] < 0.8 * losses[0]["loss"]
    for entry in losses:
        assert entry["loss"] == pytest.approx(entry["kl"] + 10 * entry["hidden_mse"], rel=1e-5)
    assert 0 < losses[-1]["flipped"] < 0.5
    assert report.steps == 12
    assert set(report.perplexity) == {"teacher", "start", "trained", "packed"}
    assert report.perplexity["packed"] == pytest.approx(report.perplexity["trained"], rel=1e-4)
    assert report.agreement is not None
    assert report.agreement < 1e-5
    stored = json.loads((case.out / "finetune.json").read_text())
    assert stored["recipe"]["lr"] == 2e-3
    assert stored["history"] == report.history
    with open_checkpoint(case.out) as checkpoint:
        assert len(checkpoint.layers) == 14
        assert {spec.shape.ranks for spec in checkpoint.layers.values()} == {(16,)}


def test_packed_model_gives_the_trained_logits(case: Case, rng: torch.Generator) -> None:
    work = case.folder / "whole.finetune"
    student = build_student(case.teacher, work / "start", RECIPE)
    state = load_file(work / "checkpoints" / "checkpoint-12" / "model.safetensors")
    student.load_state_dict(state)
    student.eval()
    ids = torch.randint(0, 257, (2, 32), generator=rng)
    with torch.no_grad():
        trained = student(ids).logits
        packed = littlebit2.load(case.out, activation="exact")(ids).logits
        pack_model(student, backend="reference")
        reference = student(ids).logits
    assert torch.equal(trained, reference)  # the same formula on the packed signs: the same bits
    assert float((trained - packed).abs().max()) < 1e-5 * float(trained.abs().max())


def test_output_generates_on_the_packed_kernels(case: Case) -> None:
    model = littlebit2.load(case.out)
    layer = model.model.layers[0].mlp.up_proj
    assert isinstance(layer, LittleBitLinear)
    result = littlebit2.generate(model, "the quick", max_new_tokens=5, ignore_eos=True)
    assert len(result.token_ids) == 5
    assert isinstance(result.text, str)
    assert "prepacked" in dict(layer.named_buffers())  # the layout that only the kernels read


def test_metrics_are_in_tensorboard(case: Case) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(case.folder / "whole.finetune" / "logs"))
    events.Reload()
    names = {"train/loss", "train/kl", "train/hidden_mse", "train/flip_rate", "eval/perplexity"}
    assert names <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("train/loss")] == [2, 4, 6, 8, 10, 12]


@pytest.mark.parametrize("step", [2, 8])
def test_a_run_that_stops_goes_on_as_if_it_had_not(case: Case, step: int) -> None:
    out = case.folder / f"resumed-{step}"
    first = finetune(
        case.teacher, out, case.data, CONFIG, recipe=dataclasses.replace(RECIPE, stop_after=step)
    )
    assert (first.out, first.steps) == (None, step)
    assert not out.exists()
    second = finetune(case.teacher, out, case.data, CONFIG, recipe=RECIPE)
    assert entries(second) == entries(case.report)
    name = "model.safetensors"
    assert (out / name).read_bytes() == (case.out / name).read_bytes()
    # Killed after the last checkpoint and before the export: nothing is trained again.
    shutil.rmtree(out)
    third = finetune(case.teacher, out, case.data, CONFIG, recipe=RECIPE)
    assert entries(third) == entries(case.report)
    assert (out / name).read_bytes() == (case.out / name).read_bytes()


def test_another_seed_is_another_run(case: Case) -> None:
    recipe = dataclasses.replace(QUICK, seed=1)
    report = finetune(case.teacher, case.folder / "seed", case.data, CONFIG, recipe=recipe)
    assert entries(report)[1]["loss"] != entries(case.report)[1]["loss"]
    assert not (case.folder / "seed.finetune").exists()  # nothing to keep


def test_other_settings_are_not_mixed(case: Case) -> None:
    out = case.folder / "mixed"
    finetune(case.teacher, out, case.data, CONFIG, recipe=dataclasses.replace(RECIPE, stop_after=2))
    other = dataclasses.replace(RECIPE, lr=1e-3)
    with pytest.raises(RunError, match=r"holds a run with other settings: lr = 0\.002 there, 0\.001 here"):
        finetune(case.teacher, out, case.data, CONFIG, recipe=other)
    report = finetune(case.teacher, out, case.data, CONFIG, recipe=other, resume=False)
    assert report.out == out


def test_a_run_in_use_is_left_alone(case: Case) -> None:
    work = run.FinetuneDirectory(case.folder / "used")
    work.open({}, resume=True)
    with pytest.raises(RunError, match=r"used\.finetune is in use by another process"):
        finetune(case.teacher, case.folder / "used", case.data, CONFIG, recipe=RECIPE)
    work.close()


@pytest.mark.parametrize(
    "changes",
    [
        {"precision": "bfloat16", "gradient_checkpointing": True, "accumulation": 2},
        {"teacher_top_k": 257, "hidden_weight": 0.0},
        {"surrogate": "clipped", "dense": "all", "scale_lr": 1e-3, "dense_lr": 1e-4},
        {"hold_out": 0.0, "dense": "none"},
    ],
    ids=", ".join,
)
def test_variants(case: Case, tmp_path: Path, changes: dict[str, Any]) -> None:
    recipe = dataclasses.replace(QUICK, **changes)
    report = finetune(case.teacher, tmp_path / "out", case.data, CONFIG, recipe=recipe)
    assert report.agreement is not None
    assert report.agreement < 1e-4
    loss = next(entry for entry in report.history if "loss" in entry)
    usual = next(entry for entry in case.report.history if "loss" in entry)
    if "teacher_top_k" in changes:
        # All tokens are kept (as float16): the KL is the whole one.
        assert loss["kl"] == pytest.approx(usual["kl"], rel=1e-2)
        assert "teacher" not in report.perplexity
    if changes.get("hold_out") == 0.0:
        assert report.perplexity == {}
    dense = load_file(tmp_path / "out" / "model.safetensors")
    before = load_file(case.teacher / "model.safetensors")
    norm, head = "model.norm.weight", "lm_head.weight"
    assert torch.equal(dense[norm], before[norm]) == (changes.get("dense") == "none")
    assert torch.equal(dense[head], before[head]) == (changes.get("dense") != "all")


def test_starts_from_a_packed_checkpoint(case: Case, tmp_path: Path) -> None:
    recipe = dataclasses.replace(QUICK, lr=1e-12, dense_lr=1e-12)
    report = finetune(case.teacher, tmp_path / "out", case.data, start=case.out, recipe=recipe)
    assert report.perplexity["start"] == pytest.approx(case.report.perplexity["packed"], rel=1e-4)
    with open_checkpoint(tmp_path / "out") as ours, open_checkpoint(case.out) as theirs:
        for name in theirs.layers:
            mine, other = ours.load_layer(name).paths[0], theirs.load_layer(name).paths[0]
            assert torch.equal(mine.v, other.v)


def test_half_precision_teacher_stays_half(tmp_path: Path) -> None:
    teacher = write_teacher(tmp_path / "t", dtype=torch.bfloat16, tie_word_embeddings=True)
    data = write_text(tmp_path / "x.txt", 3000)
    report = finetune(teacher, tmp_path / "out", data, CONFIG, recipe=QUICK)
    assert report.agreement is not None
    assert report.agreement < 1e-4
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert "lm_head.weight" not in stored
    assert stored["model.norm.weight"].dtype == torch.bfloat16
    assert stored["model.layers.0.mlp.up_proj.u1"].dtype == torch.float32


def test_a_loss_that_is_not_finite_ends_the_run(case: Case, tmp_path: Path) -> None:
    recipe = dataclasses.replace(QUICK, steps=6, lr=1e30, warmup=0.0)
    with pytest.raises(RunError, match=r"must be finite, got (nan|inf) at step \d.*--lr"):
        finetune(case.teacher, tmp_path / "out", case.data, CONFIG, recipe=recipe)
    assert not (tmp_path / "out").exists()


def test_export_that_differs_is_noticed(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from littlebit2.train.recipe import student

    def wrong(model: Any, *args: Any, **kwargs: Any) -> None:
        layer = next(iter(trainable_layers(model).values()))
        with torch.no_grad():
            layer.paths[0].U.neg_()
        right(model, *args, **kwargs)
        with torch.no_grad():
            layer.paths[0].U.neg_()

    right = student.export_student
    monkeypatch.setattr(run, "export_student", wrong)
    with pytest.raises(RunError, match=r"must give the trained model's logits within 0\.001, got a relative"):
        finetune(case.teacher, tmp_path / "out", case.data, CONFIG, recipe=QUICK)


def refuse(case: Case, tmp_path: Path, **changes: Any) -> None:
    arguments = {
        "teacher": case.teacher,
        "out": tmp_path / "out",
        "data": case.data,
        "config": CONFIG,
        "recipe": QUICK,
        **changes,
    }
    try:
        finetune(**arguments)
    finally:
        assert not (tmp_path / "out").exists()


def test_what_is_refused(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ValueError, match=r"teacher must be a dense checkpoint, got .* with 14 packed layers.*start"
    ):
        refuse(case, tmp_path, teacher=case.out)
    with pytest.raises(FileNotFoundError, match="teacher must be a checkpoint directory"):
        refuse(case, tmp_path, teacher=tmp_path / "absent")
    with pytest.raises(ValueError, match="either config or start must be given, got both"):
        refuse(case, tmp_path, start=case.out)
    with pytest.raises(ValueError, match="either config or start must be given, got none"):
        refuse(case, tmp_path, config=None)
    with pytest.raises(FileNotFoundError, match="start must be a checkpoint directory"):
        refuse(case, tmp_path, config=None, start=tmp_path / "absent")
    with pytest.raises(ValueError, match=r"start must be a packed checkpoint, got .*, which is dense"):
        refuse(case, tmp_path, config=None, start=case.teacher)
    with pytest.raises(FileExistsError, match="out must be a new or empty directory"):
        finetune(case.teacher, case.out, case.data, CONFIG, recipe=QUICK)
    with pytest.raises(ValueError, match=r"out must lie apart from the model, .* got teacher="):
        finetune(case.teacher, case.teacher, case.data, CONFIG, recipe=QUICK, overwrite=True)
    too_long = dataclasses.replace(QUICK, block=65)
    with pytest.raises(
        ValueError, match="block must be at most 64, the teacher's max_position_embeddings, got 65"
    ):
        refuse(case, tmp_path, recipe=too_long)
    short = tmp_path / "short.txt"
    short.write_text("a few words")
    with pytest.raises(ValueError, match="at least one block of 32 tokens, got 12 tokens"):
        refuse(case, tmp_path, data=short)
    short.write_text("a few words" * 10)
    with pytest.raises(ValueError, match="data must fill one step of 4 blocks of 32 tokens, got 2 blocks"):
        refuse(case, tmp_path, data=short)
    sharded = dataclasses.replace(QUICK, fsdp=True)
    with pytest.raises(ValueError, match="fsdp must be used with several processes: torchrun"):
        refuse(case, tmp_path, recipe=sharded)
    with pytest.raises(ValueError, match="device must be cpu or cuda, got 'tpu'"):
        refuse(case, tmp_path, device="tpu")
    monkeypatch.setattr(run, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"metrics need tensorboard.*littlebit2-kernels\[train\]"):
        refuse(case, tmp_path, recipe=RECIPE)


def test_teachers_that_cannot_teach(case: Case, tmp_path: Path) -> None:
    torch.manual_seed(0)
    headless = tmp_path / "headless"
    LlamaModel(llama_config()).save_pretrained(headless)
    with pytest.raises(ValueError, match=r"teacher must have a tokenizer"):
        refuse(case, tmp_path, teacher=headless)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(case.teacher / name, headless / name)
    with pytest.raises(
        ValueError, match=r"teacher must give logits \(a causal language model\), got LlamaModel"
    ):
        refuse(case, tmp_path, teacher=headless)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps must be an integer of at least 1, got 0"),
        ({"batch_size": 1.5}, r"batch_size must be an integer of at least 1, got 1\.5"),
        ({"lr": float("nan")}, "lr must be a finite number above 0.*got nan"),
        ({"scale_lr": -1.0}, r"scale_lr must be a finite number above 0.*got -1\.0"),
        ({"warmup": 1.0}, r"warmup must be below 1, got 1\.0"),
        ({"hidden_weight": -1}, "hidden_weight must be a finite number at least 0"),
        ({"surrogate": "tanh"}, "surrogate must be one of"),
        ({"dense": "some"}, "dense must be one of all, norms, none, got 'some'"),
        ({"precision": "int8"}, "precision must be one of float32, bfloat16, float16, got 'int8'"),
        ({"save_steps": 15}, "save_steps must be a multiple of log_steps=10.*got 15"),
        ({"stop_after": 5}, "stop_after must be a multiple of log_steps=10, got 5"),
        ({"teacher_top_k": 8}, r"hidden_weight must be 0 with teacher_top_k.*got 10\.0"),
    ],
)
def test_bad_recipes(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recipe(**changes)


def test_steps_of_an_epoch() -> None:
    recipe = Recipe(batch_size=4, accumulation=2, epochs=2.5)
    assert recipe.total_steps(100, 1) == 30  # 25 batches, 12 whole steps a pass
    assert recipe.total_steps(100, 3) == 10
    assert dataclasses.replace(recipe, steps=7).total_steps(100, 1) == 7


def test_perplexity_is_that_of_the_library(case: Case) -> None:
    from littlebit2.train.data import TokenBlocks, TokenFile

    tokens = TokenFile.open(case.folder / "whole.finetune" / "train.tokens")
    assert tokens is not None
    blocks = TokenBlocks(tokens, 32, 0, 5)
    model = littlebit2.load(case.teacher)
    found = perplexity(model, blocks, batch_size=2)
    with torch.no_grad():
        ids = [blocks[i]["input_ids"][None] for i in range(5)]
        expected = [float(model(one, labels=one).loss) for one in ids]
    assert found.nll == pytest.approx(sum(expected) / 5, rel=1e-5)
    assert found.tokens == 5 * 31
