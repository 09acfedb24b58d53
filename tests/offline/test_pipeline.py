"""Quantizing a checkpoint on disk, in one process."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from littlebit2 import quantize_
from littlebit2.checkpoint import open_checkpoint
from littlebit2.disk import RunError
from littlebit2.disk import run as disk_run
from littlebit2.offline import pipeline, quantize_checkpoint, work
from littlebit2.quantize import QuantConfig
from littlebit2_kernels.format import PackedLinear
from tests.offline.builders import QUICK, contents, llama_tensors, write_model

CONFIG = QuantConfig(**QUICK)


def run(model_dir: Path, out: Path, config: QuantConfig = CONFIG, **options: object):
    return quantize_checkpoint(model_dir, out, config, **{"workers": 1, "progress": False, **options})


def same(first: PackedLinear, second: PackedLinear) -> bool:
    pairs = zip(first.unique_tensors(), second.unique_tensors(), strict=True)
    return all(torch.equal(mine, other) for mine, other in pairs)


def test_layers_are_those_of_quantize_in_place_and_the_rest_is_copied(
    model_dir: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    threads = torch.get_num_threads()
    report = run(model_dir, out)
    assert torch.get_num_threads() == threads
    assert not out.with_name("out.partial").exists()
    model = nn.Module()
    with open_checkpoint(model_dir) as source, open_checkpoint(out) as made:
        assert made.format == "littlebit2"
        assert made.problems == []
        for name in made.layers:
            weight = source.load_tensor(f"{name}.weight").float()
            bias = source.load_tensor(f"{name}.bias") if f"{name}.bias" in source.dense else None
            parent = model
            *parts, leaf = name.split(".")
            for part in parts:
                if not hasattr(parent, part):
                    parent.add_module(part, nn.Module())
                parent = getattr(parent, part)
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
            linear.load_state_dict({"weight": weight, **({} if bias is None else {"bias": bias.float()})})
            parent.add_module(leaf, linear)

        reports = quantize_(model, CONFIG, progress=False).layers
        for layer_report in reports:
            assert same(made.load_layer(layer_report.name), model.get_submodule(layer_report.name).packed)
        assert len(made.layers) == 14
        assert set(made.dense) == set(report.dense) == {name for name in source.dense if "proj" not in name}
        for name in made.dense:
            assert torch.equal(made.load_tensor(name), source.load_tensor(name))
    assert (out / "tokenizer_config.json").exists()
    errors = {layer_report.name: layer_report.error for layer_report in reports}
    assert {layer["name"]: layer["error"] for layer in report.layers} == errors


def test_report(model_dir: Path, tmp_path: Path) -> None:
    report = run(
        model_dir, tmp_path / "out", QuantConfig(bpw=6.0, method="joint-itq", itq_iterations=2, kv_factor=1.5)
    )
    stored = json.loads((tmp_path / "out" / "quantization_report.json").read_text())
    assert stored == report.as_dict()
    assert "seconds" not in stored
    assert set(report.seconds) == {layer["name"] for layer in report.layers}
    assert all(seconds > 0 for seconds in report.seconds.values())
    by_name = {layer["name"].rpartition(".")[2]: layer for layer in report.layers}
    assert by_name["k_proj"]["ranks"] == [16, 16]  # 8 without kv_factor
    assert by_name["q_proj"]["ranks"] == [24, 24]
    assert by_name["q_proj"]["bias"] is True
    assert by_name["o_proj"]["bias"] is False
    for layer in report.layers:
        assert layer["error"] == layer["path_errors"][-1]
        assert layer["counted_bpw"] < layer["stored_bpw"]
    totals = stored["totals"]
    assert totals["layers"] == 14
    assert totals["weights"] == sum(x["in_features"] * x["out_features"] for x in report.layers)
    assert 0 < totals["mean_error"] < totals["worst_error"] < 1


def test_the_number_of_workers_does_not_change_a_byte(model_dir: Path, tmp_path: Path) -> None:
    run(model_dir, tmp_path / "one")
    run(model_dir, tmp_path / "three", workers=3)
    run(model_dir, tmp_path / "chosen", workers=None)
    expected = contents(tmp_path / "one")
    assert set(expected) == {
        "config.json",
        "model.safetensors",
        "quantization_report.json",
        "tokenizer_config.json",
    }
    assert contents(tmp_path / "three") == expected
    assert contents(tmp_path / "chosen") == expected


def test_a_finished_run_is_not_repeated(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(model_dir, tmp_path / "out")
    (tmp_path / "out.partial").mkdir()  # as if killed before it was removed
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "quantize_together", None)
        again = run(model_dir, tmp_path / "out")
    assert again.as_dict() == first.as_dict()
    assert not (tmp_path / "out.partial").exists()
    with pytest.raises(
        FileExistsError,
        match=r"out must be a new or empty directory, got .*out; .*is not the finished result of",
    ):
        run(model_dir, tmp_path / "out", QuantConfig(ranks=(8,)))
    with pytest.raises(FileExistsError, match="is not the finished result of this command"):
        run(model_dir, tmp_path / "out", resume=False)
    replaced = run(model_dir, tmp_path / "out", QuantConfig(ranks=(8,)), overwrite=True)
    assert replaced.layers[0]["ranks"] == [8]
    with open_checkpoint(tmp_path / "out") as checkpoint:
        assert {spec.shape.ranks for spec in checkpoint.layers.values()} == {(8,)}


def test_overwriting_takes_only_what_is_a_checkpoint(model_dir: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    (precious / "sub").mkdir(parents=True)
    (precious / "sub" / "mine.txt").write_text("mine")
    project = tmp_path / "project"
    (project / "src").mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (project / name).write_text("{}")
    file, link = tmp_path / "file", tmp_path / "link"
    file.write_text("mine")
    link.symlink_to(precious)
    before = contents(model_dir)
    for out in (precious, project, file, link):
        with pytest.raises(FileExistsError, match="out must be"):
            run(model_dir, out, overwrite=True)
    for out in (model_dir, model_dir.parent, model_dir / "inside"):
        with pytest.raises(ValueError, match="out must lie apart from the model"):
            run(model_dir, out, overwrite=True)
    assert (precious / "sub" / "mine.txt").read_text() == "mine"
    assert (project / "src").is_dir()
    assert file.read_text() == "mine"
    assert link.is_symlink()
    assert contents(model_dir) == before
    assert not list(tmp_path.glob("*.partial"))


def test_an_empty_directory_is_filled(model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    run(model_dir, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").is_file()


@pytest.mark.parametrize(("option", "value"), [("workers", 0), ("threads", 0), ("device", "cuda:99")])
def test_what_cannot_be_leaves_nothing_behind(
    model_dir: Path, tmp_path: Path, option: str, value: object
) -> None:
    if option == "device" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ValueError, match=option):
        run(model_dir, tmp_path / "out", **{option: value})
    assert not (tmp_path / "out.partial").exists()


class Stop(Exception):
    pass


def interrupted(model_dir: Path, out: Path, monkeypatch: pytest.MonkeyPatch, after: int = 3) -> None:
    """Begin a run that stops after some layers."""
    done = []

    def stop(*args: object, **options: object) -> object:
        if len(done) == after:
            raise Stop
        done.append(1)
        return original(*args, **options)  # type: ignore[arg-type]

    original = pipeline.quantize_together
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "quantize_together", stop)
        with pytest.raises(Stop):
            run(model_dir, out)
    assert not out.exists()


def test_other_settings_are_refused(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rng: torch.Generator
) -> None:
    out = tmp_path / "out"
    interrupted(model_dir, out, monkeypatch)
    with pytest.raises(
        RunError, match=r"out\.partial holds a run with other settings: seed = 0 there, 7 here; finish it"
    ):
        run(model_dir, out, QuantConfig(**QUICK, seed=7))
    with pytest.raises(RunError, match=r"exclude = \[.*\] there, \['x'\] here"):
        run(model_dir, out, exclude="x")
    other = write_model(tmp_path / "other", llama_tensors(rng))
    with pytest.raises(RunError, match="other source weights"):
        run(other, out)
    run(other, out, resume=False)
    assert out.exists()


def test_a_run_goes_on_where_it_stopped(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(model_dir, tmp_path / "whole")
    out = tmp_path / "out"
    interrupted(model_dir, out, monkeypatch)
    layers = sorted(out.with_name("out.partial").glob("*.safetensors"))
    assert len(layers) == 3
    kept = layers[0].stat().st_mtime_ns
    layers[1].write_bytes(layers[1].read_bytes()[:100])  # torn, as no rename would leave it
    layers[2].write_bytes(layers[0].read_bytes())  # of another layer
    times = []
    original = pipeline.assemble

    def look(*args: object, **options: object) -> object:
        times.append(layers[0].stat().st_mtime_ns)
        return original(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(pipeline, "assemble", look)
    run(model_dir, out)
    assert times == [kept]
    assert contents(out) == contents(tmp_path / "whole")


def test_one_process_at_a_time(model_dir: Path, tmp_path: Path) -> None:
    holder = work.WorkDirectory(tmp_path / "out", {})
    holder.open(resume=True)
    with pytest.raises(RunError, match=r"out\.partial is in use by another process"):
        run(model_dir, tmp_path / "out")
    holder.close()
    run(model_dir, tmp_path / "out", resume=False)


def test_a_full_disk_says_so_and_keeps_what_is_done(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(model_dir, tmp_path / "whole")
    out = tmp_path / "out"
    calls = []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) > 6:
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(
            RunError,
            match=r"cannot write .*safetensors \(.* MB\): No space .* free; .*the same command",
        ):
            run(model_dir, out)
    partial = out.with_name("out.partial")
    assert not out.exists()
    assert not list(partial.glob("*.tmp"))
    assert list(partial.glob("*.safetensors"))
    run(model_dir, out)
    assert contents(out) == contents(tmp_path / "whole")


def test_too_little_space_is_noticed_before_any_work(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk_run.shutil, "disk_usage", lambda path: _Usage)
    with pytest.raises(RunError, match=r"needs about .* MB free, has 0\.000 MB"):
        run(model_dir, tmp_path / "out")


class _Usage:
    free = 10


@pytest.mark.parametrize("workers", [1, 3])
def test_a_layer_that_fails_is_named_and_the_others_are_kept(
    tmp_path: Path, rng: torch.Generator, workers: int
) -> None:
    tensors = llama_tensors(rng)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan
    model_dir = write_model(tmp_path / "bad", tensors)
    with pytest.raises(
        ValueError,
        match=r"layer 'model\.layers\.1\.mlp\.up_proj': weight must be finite, got nan at .*\[3, 4\]",
    ):
        run(model_dir, tmp_path / "out", workers=workers)
    assert not (tmp_path / "out").exists()
    assert list((tmp_path / "out.partial").glob("*.safetensors"))


def test_sources_that_are_no_dense_model(model_dir: Path, tmp_path: Path) -> None:
    run(model_dir, tmp_path / "out")
    with pytest.raises(
        ValueError, match="out: must be a dense checkpoint, got one that is quantized already"
    ):
        run(tmp_path / "out", tmp_path / "twice")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        run(tmp_path / "nowhere", tmp_path / "twice")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        run(tmp_path / "empty", tmp_path / "twice")
    assert not list(tmp_path.glob("twice*"))


def test_arguments(model_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(TypeError, match="config must be a QuantConfig, got float"):
        run(model_dir, out, 0.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="threads must be a positive integer, got 0"):
        run(model_dir, out, threads=0)
    with pytest.raises(ValueError, match="workers must be a positive integer or None, got 0"):
        run(model_dir, out, workers=0)
    with pytest.raises(ValueError, match=r"layer 'model\.layers\.0\..*': bpw must be above"):
        run(model_dir, out, QuantConfig(bpw=0.1))
    with pytest.raises(ValueError, match=r"bpw must be at most .*, got 50"):
        run(model_dir, out, QuantConfig(bpw=50))
    with pytest.raises(ValueError, match=r"device must name one that torch can use here, .*'nonsense'"):
        run(model_dir, out, device="nonsense")
    assert not out.exists()
    assert not Path(f"{out}.partial").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        run(model_dir, tmp_path / "file" / "out")


def test_a_single_unsharded_file_and_other_dtypes(tmp_path: Path, rng: torch.Generator) -> None:
    model_dir = tmp_path / "single"
    model_dir.mkdir()
    tensors = {
        "a.weight": torch.randn(16, 24, generator=rng, dtype=torch.float64),
        "b.weight": torch.randn(16, 24, generator=rng).half(),
    }
    save_file(tensors, model_dir / "model.safetensors")
    (model_dir / "config.json").write_text('{"model_type": "of_its_own"}')
    report = run(model_dir, tmp_path / "out")
    assert [layer["name"] for layer in report.layers] == ["a", "b"]
