"""The command line: subcommands, exit codes, what goes to which stream."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import get_args

import pytest
import torch
import transformers

from littlebit2 import offline
from littlebit2._messages import SettingError
from littlebit2.checkpoint import CheckpointError
from littlebit2.cli import build_parser, main
from littlebit2.cli.common import METHODS, is_wrong_usage, name_options, one_line
from littlebit2.plan import load_config, shipped_configs
from littlebit2.quantize import Importance, save_importance
from littlebit2.quantize.methods import Method
from tests.offline.builders import contents, llama_tensors, write_model

COMMANDS = (
    "quantize",
    "calibrate",
    "write-text",
    "finetune",
    "evaluate",
    "convert",
    "inspect",
    "plan",
    "generate",
    "synthesize",
    "doctor",
    "completion",
)
QUICK = (
    *("--ranks", "16", "8", "--method", "joint-itq", "--itq-iterations", "3"),
    *("--workers", "1", "--quiet"),
)


@pytest.fixture
def model_dir(tmp_path: Path, rng: torch.Generator) -> Path:
    return write_model(tmp_path / "dense", llama_tensors(rng))


def python(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        check=False,
        **options,  # type: ignore[call-overload]
    )


def test_help_needs_no_torch() -> None:
    code = "import sys, littlebit2.cli; c = littlebit2.cli.main(sys.argv[1:]); "
    code += "heavy = {'torch', 'transformers', 'numpy', 'tqdm'} & set(sys.modules); "
    code += "assert not heavy, heavy; exit(c)"
    for arguments in (["--help"], ["quantize", "--help"], []):
        result = python("-c", code, *arguments)
        assert result.returncode == (0 if arguments else 2), result.stderr


def test_module_and_version() -> None:
    result = python("-m", "littlebit2", "--version")
    assert result.returncode == 0
    assert result.stdout.startswith("littlebit2 ")
    assert result.stderr == ""


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert "examples:\n  littlebit2 " in text
    assert max(map(len, text.splitlines())) <= 110


def test_choices_and_names_in_help_are_current(capsys: pytest.CaptureFixture[str]) -> None:
    assert get_args(Method) == METHODS
    main(["plan", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert all(name in text for name in shipped_configs())


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["unknown"],
        ["quantize", "model"],
        ["quantize", "model", "out", "--bpw", "0.5", "--ranks", "8"],
        ["quantize", "model", "out", "--method", "guess"],
        ["quantize", "model", "out", "--bpw", "little"],
        ["convert", "a", "b"],
        ["generate", "a"],
        ["generate", "a", "text", "--token-ids", "1"],
    ],
)
def test_wrong_usage_is_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    program = "littlebit2" if arguments[:1] in ([], ["unknown"]) else f"littlebit2 {arguments[0]}"
    assert line.startswith(f"{program}: error: ")
    assert line.endswith(f"; see {program} --help")


def test_packages_of_extras_are_named() -> None:
    script = """
import sys
from littlebit2.cli import build_parser, main
sys.modules["accelerate"] = None
sys.exit(main(["finetune", "nowhere", "out", "--data", "none.txt"]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "accelerate is not installed; pip install 'littlebit2-kernels[train]'" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quantize", "nowhere", "out"], "nowhere"),
        (["quantize", "nowhere", "out", "--bpw", "0"], "bpw must be a finite positive number, got 0.0"),
        (["quantize", "nowhere", "out", "--ranks", "9"], "ranks[0] must be a positive multiple of 8, got 9"),
        (["inspect", "nowhere"], "nowhere"),
        (["inspect", "some/model"], "Nothing is downloaded: if some/model is a model of a hub"),
        (["plan", "some/model"], "Nothing is downloaded"),
        (
            ["plan", "llama-2-7b", "--ranks", "4104"],
            "ranks must be at most 4096, the largest that any layer can use, got [4104]",
        ),
        (["convert", "nowhere", "out", "--to", "littlebit"], "nowhere"),
        (["plan", "nowhere"], "nowhere: expected a config.json"),
        (
            ["plan", "llama-2-7b", "--budget", "spectral"],
            "--budget spectral and --energy need the directory of a model, with weights, got llama-2-7b",
        ),
        (
            ["plan", "llama-2-7b", "--bpw", "0.001"],
            "layer 'model.layers.0.self_attn.q_proj': bpw must be above",
        ),
        (
            ["plan", "llama-2-7b", "--bpw", "50"],
            "bpw must be at most 2.012, what one path of the largest useful rank, min(K, N), costs in the "
            "layer that takes most, got 50.0",
        ),
        (
            ["synthesize", "llama-2-7b", "out", "--bpw", "50"],
            "bpw must be at most 4.023, what 2 paths of the largest useful rank, min(K, N), cost in the "
            "layer that takes most, got 50.0",
        ),
    ],
)
def test_errors_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    # A value that is wrong is wrong usage; a file that is not there is a failure.
    assert main(arguments) == (2 if re.search("(must be|need) ", message) else 1)
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith(f"littlebit2 {arguments[0]}: error: ")
    # The user's names of the arguments; Python's in a traceback.
    assert re.sub(r"(?<![\w-])(bpw|ranks)(?=(\[0\])? must )", r"--\1", message) in line
    with pytest.raises((ValueError, OSError), match=re.escape(message)):
        main([*arguments, "--debug"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["quantize", "nowhere", "out", "--time-budget", "0"], "--time-budget must be"),
        (["plan", "llama-2-7b", "--itq-iterations", "-1"], "--itq-iterations must be"),
        (["finetune", "nowhere", "out", "--data", "x", "--accumulate", "0"], "--accumulate must be"),
        (["quantize", "nowhere", "out", "--data", "none.txt"], "--data: no such file or directory: none.txt"),
        (["calibrate", "nowhere", "--out", "x", "--data", "none.txt"], "--data: no such file or directory"),
        (["evaluate", "nowhere", "--data", "none.txt"], "--data: no such file or directory"),
        (
            ["quantize", "nowhere", "out", "--ranks", "8", "--budget", "spectral"],
            "--budget='spectral' needs --bpw",
        ),
        (["quantize", "nowhere", "out", "--ranks", "8", "16", "--paths", "1"], "--paths must be left out or"),
    ],
)
def test_errors_name_options(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == (1 if "no such file" in said else 2)
    assert f"error: {said}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--max-new-tokens", "0"], "--max-new-tokens must be at least 1, got 0"),
        (["--temperature", "0"], "--temperature must be positive, got 0.0"),
        (["--top-k", "-1"], "--top-k must be at least 0, got -1"),
        (["--top-p", "1.5"], "--top-p must be above 0 and at most 1, got 1.5"),
        (["--repetition-penalty", "-2"], "--repetition-penalty must be positive, got -2.0"),
        (["--batch-size", "0"], "--batch-size must be at least 1, got 0"),
        (
            ["--step", "graph", "--cache", "dynamic"],
            "--cache must be static for --step='graph'",
        ),
    ],
)
def test_wrong_values_are_one_line(options: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "nowhere", "text", *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"littlebit2 generate: error: {said}")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "wrong"),
    [
        (ValueError("bpw must be positive, got 0"), True),
        (ValueError("ranks[1] must be a positive multiple of 8, got 9"), True),
        (ValueError("layer 'a.b': ranks [8, 16] would store 20 bits per weight"), True),
        (ValueError("bpw or ranks must be given"), True),
        (ValueError("budget='kl' needs bpw"), True),
        (SettingError("whatever it says"), True),
        (ValueError("a.safetensors: bpw must be positive"), False),
        (ValueError("bpwx must be positive"), False),
        (FileExistsError("out must be a new file, got x"), False),
        (CheckpointError("out must hold packed layers"), False),
        (RuntimeError("bpw must be positive"), False),
    ],
)
def test_what_is_wrong_usage(error: Exception, wrong: bool) -> None:
    options = {"bpw": "--bpw", "ranks": "--ranks", "budget": "--budget", "out": "OUT"}
    assert is_wrong_usage(error, name_options(one_line(error), options), options) == wrong


def test_chat_needs_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "nowhere", "--token-ids", "1", "--chat"]) == 2
    assert "--chat and --system need text, got --token-ids" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_an_unknown_option_names_its_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    needed = {"calibrate": ["--data", "t", "--out", "o"], "convert": ["o", "--to", "littlebit2"]}
    needed |= {"finetune": ["o", "--data", "t"], "evaluate": ["--data", "t"], "quantize": ["o"]}
    needed |= {"generate": ["text"], "synthesize": ["o", "--bpw", "1"]}
    needed |= {"write-text": ["o.jsonl"]}
    model = {"doctor": [], "completion": ["bash"]}.get(command, ["model"])
    assert main([command, *model, *needed.get(command, []), "--nothing", "1"]) == 2
    program = f"littlebit2 {command}"
    expected = f"{program}: error: unrecognized arguments: --nothing 1; see {program} --help\n"
    assert capsys.readouterr().err == expected


def test_a_plan_takes_the_command_line_of_quantize(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [str(model_dir), str(tmp_path / "out"), "--bpw", "3", "--json", "--quiet"]
    assert main(["quantize", *given, "--workers", "1", "--admm-iterations", "3", "--no-trial"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert main(["plan", *given, "--workers", "1", "--admm-iterations", "3", "--no-trial"]) == 0
    planned = json.loads(capsys.readouterr().out)
    ranks = [{layer["name"]: list(layer["ranks"]) for layer in one["layers"]} for one in (made, planned)]
    assert ranks[0] == ranks[1]
    assert main(["plan", *given, "--data", "a text", "--steps", "3"]) == 0
    assert {len(layer["ranks"]) for layer in json.loads(capsys.readouterr().out)["layers"]} == {1}
    for command in ("plan", "quantize"):
        assert main([command, *given, "--data", "a text", "--workers", "1"]) == 2
        assert "--workers: not with --method blockwise" in capsys.readouterr().err


def test_plan_and_finetune_take_the_options_of_quantize() -> None:
    options = {
        command: {option for action in parser._actions for option in action.option_strings}
        for command, parser in build_parser()._subparsers._group_actions[0].choices.items()  # type: ignore
    }
    assert options["quantize"] == options["plan"]
    of_text = {"--data", "--text-field", "--samples", "--length", "--held-out", "--steps", "--batch-size"}
    of_text |= {"--lr", "--scale-lr", "--keep-work", "--distill-steps", "--distill-lr"}
    of_text |= {"--distill-scale-lr", "--minutes", "--sensitivity", "--kl-samples"}
    of_text |= {"--distill-samples", "--distill-minutes", "--plot", "--keep-latents"}
    # What was trained is rounded afterwards, by convert.
    not_of_finetune = {"--no-trial", "--workers", "--threads", "--embedding"}
    assert options["quantize"] - not_of_finetune - of_text <= options["finetune"]


@pytest.mark.parametrize(
    "command",
    [
        ["generate", "{model}", "--token-ids", "1"],
        ["quantize", "{model}", "out"],
        ["calibrate", "{model}", "--data", "none.txt", "--out", "out"],
    ],
    ids=lambda command: command[0],
)
def test_a_device_that_cannot_be_used_is_told_alike(
    command: list[str], model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for device in ("nonsense", "cuda:99"):
        assert main([*(part.format(model=model_dir) for part in command), "--device", device]) == 2
        expected = f"error: --device must name one that torch can use here, such as 'cpu', got '{device}' ("
        assert expected in capsys.readouterr().err


def test_layers_that_cannot_use_more_bits_are_shown(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "llama-2-7b", "--bpw", "1.5"]) == 0
    expected = (
        "96 layers are at the largest useful rank, min(K, N), and cannot use more bits: model.layers.0.mlp"
    )
    assert expected in capsys.readouterr().out
    assert main(["plan", "llama-2-7b", "--bpw", "1.5", "--json"]) == 0
    layers = json.loads(capsys.readouterr().out)["layers"]
    full = {layer["name"].rpartition(".")[2] for layer in layers if layer["at_largest_rank"]}
    assert full == {"gate_proj", "up_proj", "down_proj"}
    assert main(["plan", "llama-2-7b", "--bpw", "1"]) == 0
    assert "largest useful rank" not in capsys.readouterr().out
    config = json.loads((model_dir / "config.json").read_text())
    assert config["intermediate_size"] > config["hidden_size"] == 32
    out, options = tmp_path / "out", ["--bpw", "3.2", "--method", "dual-svid", "--paths", "1", "--exclude"]
    assert main(["quantize", str(model_dir), str(out), *options, "*.[kv]_proj"]) == 0
    captured = capsys.readouterr()
    assert "layers are at the largest useful rank, min(K, N), and cannot use more bits" in captured.out
    assert captured.err == ""  # without --quiet: no progress bar where stderr is no terminal
    report = json.loads((out / "quantization_report.json").read_text())
    assert 0 < report["totals"]["at_largest_rank"] < report["totals"]["layers"]


def test_quantize_and_inspect(model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["quantize", str(model_dir), str(out), *QUICK]) == 0
    captured = capsys.readouterr()
    assert "14 layers, counted" in captured.out
    assert captured.err == ""
    assert main(["inspect", str(out)]) == 0
    text = capsys.readouterr().out
    assert "format littlebit2, model type qwen2" in text
    assert "model.layers.*.mlp.up_proj" in text
    assert "16+8" in text
    assert main(["inspect", str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["totals"]["layers"] == 14
    assert found["layers"]["model.layers.0.self_attn.q_proj"]["ranks"] == [16, 8]
    assert main(["inspect", str(model_dir)]) == 0
    assert "format dense" in capsys.readouterr().out


def test_quantize_json_and_patterns(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--json", "--include", "*.mlp.*", "--exclude", "*.0.*", "--method", "dual-svid", "--seed", "3"]
    assert main(["quantize", str(model_dir), str(tmp_path / "out"), *QUICK, *options]) == 0
    report = json.loads(capsys.readouterr().out)
    assert {layer["name"] for layer in report["layers"]} == {
        f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up", "down")
    }
    assert set(report["seconds"]) == {layer["name"] for layer in report["layers"]}
    assert report["settings"]["method"] == "dual-svid"
    assert report["settings"]["seed"] == 3
    assert "lm_head.weight" in report["dense"]
    options = ["--json", "--include", "lm_head", "--head", "packed"]
    assert main(["quantize", str(model_dir), str(tmp_path / "head"), *QUICK, *options]) == 0
    assert [layer["name"] for layer in json.loads(capsys.readouterr().out)["layers"]] == ["lm_head"]


def test_quantize_by_spectra_and_activations(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "model.layers.1.mlp.up_proj"
    save_importance(tmp_path / "importance", {name: Importance(torch.ones(32))})
    options = ["--bpw", "3", "--budget", "spectral", "--admm-iterations", "3", "--quiet"]
    options += ["--importance", str(tmp_path / "importance")]
    assert main(["quantize", str(model_dir), str(tmp_path / "out"), *options]) == 0
    report = json.loads((tmp_path / "out/quantization_report.json").read_text())
    # One layer has an importance: the error that is predicted and minimized is the weighted one there alone.
    weights = [layer["in_features"] * layer["out_features"] for layer in report["layers"]]
    kinds = ["weighted_error" if layer["name"] == name else "error" for layer in report["layers"]]
    errors = [layer[kind] for layer, kind in zip(report["layers"], kinds, strict=True)]
    mean = sum(error * weight for error, weight in zip(errors, weights, strict=True)) / sum(weights)
    assert report["totals"]["mean_minimized_error"] == pytest.approx(mean)
    assert (
        "squared relative error weighted by importance: predicted from the spectra "
        f"{report['totals']['mean_predicted_error']:.4f}, achieved {mean:.4f}"
    ) in capsys.readouterr().out
    assert main(["plan", str(model_dir), *options[:2], *options[-2:]]) == 0
    assert "--importance changes a plan only with --budget spectral" in capsys.readouterr().err
    options = ["--energy", "0.8", "--method", "refine", "--refine-rounds", "1", "--quiet", "--json"]
    assert main(["quantize", str(model_dir), str(tmp_path / "energy"), *options]) == 0
    report = json.loads(capsys.readouterr().out)
    assert {layer["method"] for layer in report["layers"]} == {"refine"}
    assert report["settings"]["energy"] == 0.8
    assert main(["quantize", str(model_dir), str(tmp_path / "x"), "--importance", "nothing"]) == 1
    assert "nothing" in capsys.readouterr().err


def test_only_commands_that_take_the_model_are_recommended(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = transformers.T5Config(vocab_size=64, d_model=32, d_kv=16, d_ff=48, num_layers=1, num_heads=2)
    transformers.T5EncoderModel(config).save_pretrained(tmp_path / "t5")
    options = ["--ranks", "16", "--workers", "1", "--quiet"]
    assert main(["quantize", str(tmp_path / "t5"), str(tmp_path / "out"), *options]) == 0
    printed = capsys.readouterr().out
    assert f"next, in Python:\n  model = littlebit2.load({str(tmp_path / 'out')!r})" in printed
    assert "more bits (--bpw), or fewer layers (--exclude)" in printed
    assert "finetune" not in printed
    assert "evaluate" not in printed
    assert main(["quantize", str(model_dir), str(tmp_path / "lm"), *options, "--no-trial"]) == 0
    assert f"--start {tmp_path / 'lm'}" in capsys.readouterr().out


def test_convert_there_and_back(model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours, theirs, back = (tmp_path / name for name in ("ours", "theirs", "back"))
    assert main(["quantize", str(model_dir), str(ours), *QUICK[:1], "16", "16", *QUICK[3:]]) == 0
    assert main(["convert", str(ours), str(theirs), "--to", "littlebit"]) == 0
    assert main(["convert", str(theirs), str(back), "--to", "littlebit2"]) == 0
    capsys.readouterr()
    formats = []
    for path in (theirs, back):
        assert main(["inspect", str(path), "--json"]) == 0
        formats.append(json.loads(capsys.readouterr().out)["format"])
    assert formats == ["littlebit", "littlebit2"]


def test_overwrite_takes_checkpoints_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, command = tmp_path / "out", ["synthesize", "llama", "OUT", "--bpw", "1", "--quiet"]
    config = {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "vocab_size": 32,
    }
    source = tmp_path / "config.json"
    source.write_text(json.dumps(config))
    command[1:3] = [str(source), str(out)]
    command[4] = "3"
    assert main(command) == 0
    assert main(command) == 1
    assert "; --overwrite replaces a checkpoint" in capsys.readouterr().err
    assert main([*command, "--overwrite"]) == 0
    converted = tmp_path / "converted"
    convert = ["convert", str(out), str(converted), "--to", "littlebit2"]
    assert [main(convert), main(convert), main([*convert, "--overwrite"])] == [0, 1, 0]
    (converted / "folder").mkdir()
    assert main([*convert, "--overwrite"]) == 1
    assert "must be a checkpoint and nothing else to be overwritten" in capsys.readouterr().err


def test_plan_of_something_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    weights.write_bytes(b"\0" * 16)
    config.write_text('{"model_type": "nobody"}')
    assert main(["plan", str(weights)]) == 1
    assert "must be a config.json or a directory with one, got a file of weights" in capsys.readouterr().err
    assert main(["plan", str(config)]) == 1
    assert "model_type must be one that transformers" in capsys.readouterr().err


def test_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "llama-2-13b", "--bpw", "0.1", "--paths", "2"]) == 0
    text = capsys.readouterr().out
    assert "104+104" in text
    assert "TOTAL in memory" in text
    assert "0.839 GB" in text
    assert main(["plan", "llama-2-13b", "--bpw", "0.1", "--paths", "2", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert len(plan["layers"]) == 280
    assert plan["bytes"]["total"] == pytest.approx(0.839e9, rel=0.001)
    assert plan["left_dense"] == ["lm_head"]


def test_synthesize_and_generate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    sizes = {
        "vocab_size": 64,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
    }
    config = {**load_config("llama-2-7b"), **sizes}
    (tmp_path / "config.json").write_text(json.dumps(config))
    out = str(tmp_path / "out")
    assert main(["synthesize", str(tmp_path / "config.json"), out, "--bpw", "3", "--json", "--quiet"]) == 0
    assert len(json.loads(capsys.readouterr().out)["layers"]) == 14
    prompt = ["--token-ids", "1", "2", "3", "--max-new-tokens", "4", "--ignore-eos"]
    assert main(["generate", out, *prompt, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert len(result["token_ids"]) == 4
    assert result["prompt_tokens"] == 3
    assert main(["generate", out, *prompt]) == 0
    captured = capsys.readouterr()
    assert captured.out.split() == [str(token) for token in result["token_ids"]]
    assert "tokens/s" in captured.err
    assert main(["generate", out, "some text"]) == 2
    assert "has no tokenizer" in capsys.readouterr().err


def test_an_interrupt_is_clean(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(offline, "quantize_checkpoint", interrupt)
    assert main(["quantize", "model", "out"]) == 130
    assert capsys.readouterr().err == (
        "littlebit2 quantize: interrupted; the same command continues from here\n"
    )


def test_control_c_during_the_work_leaves_it_resumable(tmp_path: Path, rng: torch.Generator) -> None:
    model_dir = write_model(tmp_path / "many", llama_tensors(rng, layers=12))
    options = [
        "--ranks",
        "16",
        "--method",
        "joint-itq",
        "--itq-iterations",
        "200",
        "--workers",
        "2",
        "--quiet",
    ]
    for attempt in range(10):
        out = tmp_path / f"out{attempt}"
        # Where the tests run in the background, they and their children inherit a signal that is ignored.
        command = ["env", "--default-signal=INT", sys.executable, "-m", "littlebit2", "quantize"]
        command += [str(model_dir), str(out), *options]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        work = tmp_path / f"{out.name}.partial"
        while process.poll() is None and not list(work.glob("*.safetensors")):
            time.sleep(0.001)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
        # On a busy machine the work may be over before the signal is there.
        if process.returncode != 0:
            break
    assert process.returncode == 130, errors
    assert output == ""
    assert errors == "littlebit2 quantize: interrupted; the same command continues from here\n"
    assert not out.exists()
    assert main(["quantize", str(model_dir), str(out), *options]) == 0
    assert main(["quantize", str(model_dir), str(tmp_path / "whole"), *options]) == 0
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    "module", ["littlebit2 quantize --help", "littlebit2 --version", "littlebit2_kernels.diagnostics"]
)
def test_no_reader_is_no_traceback(module: str) -> None:
    # What comes at once finds the reader gone, and so does what is left in the buffer at the end.
    for unbuffered in ("", "1"):
        result = subprocess.run(
            ["bash", "-c", f"{{ sleep 0.2; exec {sys.executable} -m {module}; }} | true; exit $PIPESTATUS"],
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.stderr == ""
        # argparse takes no notice of help that is not read; 120 would be the interpreter's flush.
        assert result.returncode in ((0, 1) if "--help" in module else (1,))


def test_a_reader_that_goes_away_is_no_traceback() -> None:
    command = f"{sys.executable} -m littlebit2 plan llama-2-70b --json | head -n 1"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert result.stdout == "{\n"
    assert result.stderr == ""


def test_init_is_another_name_of_method(model_dir: Path, tmp_path: Path) -> None:
    renamed = ["--init" if option == "--method" else option for option in QUICK]
    for out, options in (("a", QUICK), ("b", renamed)):
        assert main(["quantize", str(model_dir), str(tmp_path / out), *options]) == 0
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
