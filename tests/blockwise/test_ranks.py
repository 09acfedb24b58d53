"""Ranks by what the model's output loses."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from littlebit2 import load, quantize_
from littlebit2.architecture.parts import Whole
from littlebit2.architecture.tensors import LayerSource
from littlebit2.blockwise import BlockwiseSettings
from littlebit2.blockwise.ranking import kl
from littlebit2.blockwise.ranking.allocation import BOUNDS, Curve, LayerGroup, allocate, fit, grouped
from littlebit2.blockwise.text import load_tokenizer, sequences
from littlebit2.blockwise.tuning.block import BlockRunner
from littlebit2.cli import main
from littlebit2.disk import RunError
from littlebit2.offline.jobs import Job
from littlebit2.plan import plan_model
from littlebit2.quantize import QuantConfig
from littlebit2.train.losses import distillation_kl
from tests.blockwise.builders import QUICK, run, write_data, write_model
from tests.offline.builders import contents

KL = QuantConfig(bpw=2.5, budget="kl", method="admm", admm_iterations=5, refine_rounds=1)
WIDE = {"hidden_size": 64, "intermediate_size": 96}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("text") / "text.txt")


def group(name: str, n: int, k: int, *ranks: int, count: int = 1) -> LayerGroup:
    jobs = [
        Job(i, LayerSource(f"{name}.{i}", k, n, Whole(name), None, f"{name}.{i}"), QuantConfig(ranks=ranks))
        for i in range(count)
    ]
    return LayerGroup(0, name, tuple(jobs))


def spent(groups: list[LayerGroup], ranks: list[int]) -> int:
    return sum(one.bits(rank) for one, rank in zip(groups, ranks, strict=True))


def test_the_bits_are_those_of_uniform_ranks_and_bounds_hold(rng: torch.Generator) -> None:
    shapes = [(64, 64), (96, 64), (64, 96), (16, 64)]
    groups = [
        group(f"g{i}", *shapes[i % 4], *([40] if shapes[i % 4][0] > 16 else [8]), count=1 + i % 3)
        for i in range(24)
    ]
    for spread in (0.0, 1.0, 5.0):
        levels = (spread * torch.randn(24, generator=rng)).exp().tolist()
        ranks = allocate(groups, [Curve(level, 1.0) for level in levels])
        budget = spent(groups, [one.uniform[0] for one in groups])
        steps = [
            one.bits(rank + 8) - one.bits(rank)
            for one, rank in zip(groups, ranks, strict=True)
            if rank + 8 in one.options
        ]
        assert budget - min(steps) < spent(groups, ranks) <= budget
        for one, rank in zip(groups, ranks, strict=True):
            assert max(8, BOUNDS[0] * one.uniform[0] - 8) <= rank <= min(64, BOUNDS[1] * one.uniform[0])
            assert rank % 8 == 0
        if spread == 1.0:
            assert len(set(ranks)) > 4


def test_no_swap_of_ranks_is_better(rng: torch.Generator) -> None:
    groups = [group(f"g{i}", 64, 64, 40) for i in range(6)]
    curves = [Curve(float(torch.rand((), generator=rng)), 0.5 + 0.2 * i) for i in range(6)]

    def loss(ranks: list[int]) -> float:
        return sum(curve.at(rank / 40) for curve, rank in zip(curves, ranks, strict=True))

    best = allocate(groups, curves)
    for i in range(6):
        for j in range(6):
            other = list(best)
            other[i], other[j] = other[i] + 8, other[j] - 8
            if i != j and other[i] in groups[i].options and other[j] in groups[j].options:
                assert loss(other) >= loss(best) - 1e-12


def test_curves_fall_whatever_was_measured() -> None:
    groups = [group(f"g{i}", 64, 64, 40) for i in range(5)]
    measured = [
        {24: 0.4, 64: 0.1},
        {24: 0.1, 64: 0.4},  # noise
        {24: math.nan, 64: 0.3},
        {24: math.inf, 64: math.nan},
        {24: -1e-9, 64: 0.0},
    ]
    curves = fit(groups, measured)
    assert all(curve.decay >= 0 and 0 < curve.kl < math.inf for curve in curves)
    # Half of it is the group's own decay, half the median, of one that is noise and one that knows none.
    own = math.log(4) / (64 / 40 - 24 / 40)
    assert curves[0].decay == pytest.approx(own / 2)
    assert curves[0].at(0.6) * curves[0].at(1.6) == pytest.approx(0.4 * 0.1)
    assert curves[1].decay == curves[2].decay == 0
    assert curves[3].kl == max(curve.kl for curve in curves)
    assert curves[4].kl < 1e-6
    with pytest.raises(
        ValueError, match="whose output stays finite, got NaN or infinity whatever is quantized"
    ):
        fit(groups, [{24: math.nan}] * 5)


def test_experts_are_one_group() -> None:
    names = ["attn.q", "mlp.experts.0.up", "mlp.experts.1.up", "mlp.experts.0.down", "mlp.up2"]
    config = QuantConfig(ranks=(8,))
    jobs = [
        Job(i, LayerSource(name, 64, 64, Whole(name), None, f"m.3.{name}"), config)
        for i, name in enumerate(names)
    ]
    found = grouped(jobs, 3, "m.3")
    assert [(one.name, len(one.jobs), one.block) for one in found] == [
        ("m.3.attn.q", 1, 3),
        ("m.3.mlp.experts.*.up", 2, 3),
        ("m.3.mlp.experts.*.down", 1, 3),
        ("m.3.mlp.up2", 1, 3),
    ]


def test_trials_are_near_the_sizes_and_possible() -> None:
    assert group("g", 64, 64, 40).trial_ranks([0.6, 1.6]) == [24, 64]
    assert group("g", 64, 64, 64).trial_ranks([0.6, 1.6]) == [40, 64]
    assert group("g", 64, 64, 8).trial_ranks([0.1, 1.0]) == [8]


@pytest.mark.parametrize("family", ["qwen2", "gemma3"])
def test_kl_as_of_the_whole_model(
    family: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_model(tmp_path / "dense", family)

    def nothing(packed: Any, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(packed.out_features, packed.in_features, dtype=dtype)

    monkeypatch.setattr(kl, "dense_weight", nothing)
    report = run(
        path, tmp_path / "out", data, config=KL, changes={"steps": 0, "kl_samples": 3, "kl_length": 12}
    )
    text = {name: QUICK[name] for name in ("length", "held_out")}
    ids = sequences(tmp_path / "tokens", [data], load_tokenizer(path), seed=0, samples=3, most=12, **text)
    ids = ids[:3, :12]
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    picked = slice(2, 12, 3)
    with torch.no_grad():
        dense = model(input_ids=ids, use_cache=False).logits[:, picked]
        assert report.allocation is not None
        for one in report.allocation["groups"]:
            weight = model.get_submodule(one["name"]).weight
            kept = weight.clone()
            weight.zero_()
            expected = float(distillation_kl(model(input_ids=ids, use_cache=False).logits[:, picked], dense))
            weight.copy_(kept)
            assert one["layers"] == 1
            for _, measured in one["measured"]:
                assert measured == pytest.approx(expected, rel=1e-3), one["name"]
    assert len(report.allocation["groups"]) == len(report.run.layers)


def write_uneven(path: Path) -> Path:
    """A model whose later blocks add little to the hidden state."""
    write_model(path, num_hidden_layers=4, **WIDE)
    model = transformers.AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        for block in model.model.layers[1:]:
            block.self_attn.o_proj.weight.mul_(0.02)
            block.mlp.down_proj.weight.mul_(0.02)
    model.save_pretrained(path)
    return path


def test_lower_kl_than_with_uniform_ranks(data: Path, tmp_path: Path) -> None:
    path = write_uneven(tmp_path / "dense")
    text = {name: QUICK[name] for name in ("length", "samples", "held_out")}
    ids = sequences(tmp_path / "tokens", [data], load_tokenizer(path), seed=0, **text)[-QUICK["held_out"] :]
    dense = load(path, dtype=torch.float32)
    loss, bits = {}, {}
    for budget in ("uniform", "kl"):
        config = QuantConfig(bpw=2.0, budget=budget, method="admm", admm_iterations=10, refine_rounds=1)
        report = run(path, tmp_path / budget, data, config=config, changes={"steps": 0})
        quantized = load(tmp_path / budget, dtype=torch.float32, activation="exact")
        with torch.no_grad():
            one, other = (model(input_ids=ids, use_cache=False).logits for model in (quantized, dense))
            loss[budget] = float(distillation_kl(one, other))
        bits[budget] = report.run.totals()["counted_bpw"]
        assert (report.allocation is None) == (budget == "uniform")
    expected = report.allocation["kl"]
    assert expected["allocated"] < expected["uniform"]
    assert bits["kl"] <= bits["uniform"] < bits["kl"] + 0.02
    assert loss["kl"] < 0.75 * loss["uniform"]
    ranks = {one["name"]: one["rank"] / one["uniform_rank"] for one in report.allocation["groups"]}
    assert ranks["model.layers.0.mlp.down_proj"] > ranks["model.layers.3.mlp.down_proj"]
    assert {layer["name"]: layer["ranks"] for layer in report.run.layers} == {
        one["name"]: [one["rank"]] for one in report.allocation["groups"]
    }


def test_a_run_that_goes_on_measures_nothing_again(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_model(tmp_path / "dense", **WIDE)
    run(path, tmp_path / "whole", data, config=KL, changes={"steps": 2})
    out = tmp_path / "out"

    def fail(*_: object, **__: object) -> None:
        raise RunError("stopped")

    with monkeypatch.context() as patched:
        patched.setattr("littlebit2.blockwise.tuning.block.BlockRunner.run", fail)
        with pytest.raises(RunError, match="stopped"):
            run(path, out, data, config=KL, changes={"steps": 2})
    kept = json.loads((tmp_path / "out.partial" / "ranks.json").read_text())
    assert not list((tmp_path / "out.partial").glob("trials*"))
    monkeypatch.setattr("littlebit2.blockwise.ranking.settle.measure_kl", fail)
    report = run(path, out, data, config=KL, changes={"steps": 2})
    assert report.allocation == kept["entry"]
    assert report.seconds["ranks"] == kept["seconds"]
    assert contents(out) == contents(tmp_path / "whole")


def test_its_time_is_part_of_the_minutes(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_model(tmp_path / "dense", **WIDE)
    left: list[float] = []

    def fitting(runner: BlockRunner, jobs: object, blocks: object, seconds: float) -> BlockwiseSettings:
        left.append(seconds)
        return replace(runner.settings, samples=3, steps=1)

    monkeypatch.setattr("littlebit2.blockwise.run.fitting", fitting)
    changes = {"minutes": 2.0, "distill_minutes": 0.0}
    report = run(path, tmp_path / "out", data, config=KL, changes=changes)
    assert report.seconds["ranks"] > 0
    assert left == [pytest.approx(120 - report.seconds["ranks"])]


def test_the_command_says_what_was_chosen(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(write_model(tmp_path / "dense", **WIDE))
    size = ["--bpw", "2.5", "--budget", "kl", "--data", str(data), "--admm-iterations", "5"]
    quick = ["--length", "16", "--samples", "12", "--held-out", "3", "--steps", "0", "--kl-samples", "2"]
    assert main(["plan", path, *size]) == 0
    assert "--budget kl: quantize measures the ranks" in capsys.readouterr().err
    assert main(["quantize", path, str(tmp_path / "out"), *size, *quick, "--quiet", "--threads", "1"]) == 0
    assert "ranks by the KL of the output, 0." in capsys.readouterr().out
    content = json.loads((tmp_path / "out" / "blockwise_report.json").read_text())
    assert content["allocation"]["kl"]["allocated"] <= content["allocation"]["kl"]["uniform"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget", "kl"], "--budget kl: only with --method blockwise and --data"),
        (
            ["--budget", "kl", "--data", "DATA", "--kv-factor", "2"],
            "--kv-factor must be 1 with --budget='kl'",
        ),
        (["--budget", "kl", "--data", "DATA", "--ranks", "8"], "--budget='kl' needs --bpw"),
        (["--budget", "spectral", "--data", "DATA"], "--budget spectral: not with --method blockwise"),
    ],
)
@pytest.mark.parametrize("command", ["quantize", "plan"])
def test_options_that_contradict(
    command: str, arguments: list[str], message: str, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [str(data) if argument == "DATA" else argument for argument in arguments]
    assert main([command, "nowhere", "out", *given]) == 2
    assert message in capsys.readouterr().err


def test_without_text_it_is_refused() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(64, 64))
    with pytest.raises(ValueError, match=r"budget='kl' needs text.*quantize_blockwise"):
        quantize_(model, KL, progress=False)
    with pytest.raises(ValueError, match="budget='kl' needs text"):
        plan_model("llama-2-7b", QuantConfig(budget="kl"))
