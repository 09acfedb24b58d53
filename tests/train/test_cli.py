"""``littlebit2 finetune`` and ``littlebit2 evaluate``."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from littlebit2.cli import main
from tests.train.builders import write_teacher, write_text

QUICK = [
    *("--block", "32", "--steps", "2", "--batch-size", "4", "--log-steps", "1", "--save-steps", "1"),
    *("--no-tensorboard", "--quiet", "--hold-out", "0.1"),
]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("cli")
    return write_teacher(folder / "teacher"), write_text(folder / "text.txt", 4000)


def test_finetune_then_evaluate(
    inputs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher, data = map(str, inputs)
    out = str(tmp_path / "out")
    arguments = [
        "finetune",
        teacher,
        out,
        "--data",
        data,
        "--bpw",
        "3",
        "--paths",
        "1",
        "--init",
        "joint-itq",
    ]
    assert main([*arguments, *QUICK, "--exclude", "*.q_proj", "--eval-data", data]) == 0
    printed = capsys.readouterr().out
    assert f"{out}: 2.365 counted" in printed
    assert "bits per weight, 2 steps" in printed
    figures = {line.split()[0]: float(line.split()[1]) for line in printed.splitlines()[2:6]}
    assert set(figures) == {"teacher", "start", "trained", "packed"}
    assert main(["evaluate", out, "--data", data, "--block", "32", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["text"]
    assert found["perplexity"] == pytest.approx(figures["packed"], rel=1e-3)
    assert found["block"] == 32
    assert main(["evaluate", teacher, "--data", data, "--block", "32"]) == 0
    assert float(capsys.readouterr().out.split()[1]) == pytest.approx(figures["teacher"], rel=1e-3)
    compare = ["evaluate", out, "--data", data, "--block", "32", "--stride", "16", "--teacher", teacher]
    assert main(compare) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert "tokens in blocks of 32 every 16)" in first
    assert re.fullmatch(
        r"teacher [\d.]+, ratio of perplexities [\d.]+; KL [\d.]+ nats a token, "
        r"likeliest token the same for [\d.]+%",
        second,
    )
    assert main([*compare, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["text"]
    assert found["stride"] == 16
    assert found["kl"] > 0
    assert found["perplexity_ratio"] == pytest.approx(found["perplexity"] / found["teacher_perplexity"])
    assert f"ratio of perplexities {found['perplexity_ratio']:.4f};" in second
    assert 0 <= found["top1"] < 1
    assert main(["inspect", out, "--json"]) == 0
    layers = capsys.readouterr().out
    assert "q_proj.V_packed" not in layers
    assert main(["finetune", teacher, out, "--data", data, "--start", out, *QUICK, "--overwrite"]) == 0


def test_nothing_but_metrics_goes_to_a_log(
    inputs: tuple[Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    teacher, data = map(str, inputs)
    loud = [option for option in QUICK if option != "--quiet"]
    arguments = [
        "finetune",
        teacher,
        str(tmp_path / "out"),
        "--data",
        data,
        "--bpw",
        "3",
        "--init",
        "joint-itq",
    ]
    assert main([*arguments, "--paths", "1", *loud, "--teacher-top-k", "4"]) == 0
    assert "it/s" not in (shown := capfd.readouterr().err)
    assert "\r" not in shown
    assert "%|" not in shown


def test_evaluate_needs_no_package_of_training(inputs: tuple[Path, Path]) -> None:
    teacher, data = map(str, inputs)
    script = f"""
import sys
for name in ("accelerate", "peft", "pyarrow", "tensorboard"):
    sys.modules[name] = None
from littlebit2.cli import main
code = main(["evaluate", {teacher!r}, "--data", {data!r}, "--block", "32", "--max-tokens", "200"])
assert "littlebit2.train.recipe.run" not in sys.modules
sys.exit(code)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("perplexity ")
    assert done.stderr == ""


def test_tasks_go_to_the_harness(
    inputs: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher, _ = inputs
    seen: dict[str, Any] = {}

    class HFLM:
        def __init__(self, **options: Any) -> None:
            seen.update(options)

    class TaskManager:
        def __init__(self, include_path: str | None) -> None:
            seen["include_path"] = include_path

        def match_tasks(self, names: list[str]) -> list[str]:
            return names

    def simple_evaluate(**options: Any) -> dict[str, Any]:
        seen.update(options)
        return {"results": {"arc_easy": {"acc,none": 0.25, "alias": "arc_easy"}}}

    harness: Any = types.ModuleType("lm_eval")
    harness.models = types.ModuleType("lm_eval.models")
    harness.models.huggingface = types.ModuleType("lm_eval.models.huggingface")
    harness.models.huggingface.HFLM = HFLM
    harness.tasks = types.ModuleType("lm_eval.tasks")
    harness.tasks.TaskManager = TaskManager
    harness.simple_evaluate = simple_evaluate
    for module in (harness, harness.models, harness.models.huggingface, harness.tasks):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    assert main(["evaluate", str(teacher), "--tasks", "arc_easy", "--limit", "5"]) == 0
    assert capsys.readouterr().out.split() == ["task", "metric", "value", "arc_easy", "acc,none", "0.2500"]
    assert (seen["tasks"], seen["limit"], seen["batch_size"]) == (["arc_easy"], 5, 8)
    assert seen["include_path"] is None
    assert type(seen["pretrained"]).__name__ == "LlamaForCausalLM"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "{teacher}"], "--data or --tasks must be given"),
        (["evaluate", "{teacher}", "--tasks", "x"], "tasks need lm-evaluation-harness: pip install lm_eval"),
        (
            ["evaluate", "{teacher}", "--data", "{data}", "--include-path", "x"],
            "--include-path needs --tasks",
        ),
        (
            ["evaluate", "{teacher}", "--tasks", "x", "--include-path", "absent"],
            "must be a directory, got absent",
        ),
        (["evaluate", "absent", "--data", "{data}"], "MODEL must be a checkpoint directory"),
        (["evaluate", "{teacher}", "--data", "{data}", "--block", "65"], "block must be at most 64"),
        (["evaluate", "absent", "--data", "{data}", "--block", "1"], "block must be at least 2, got 1"),
        (["evaluate", "absent", "--data", "{data}", "--stride", "0"], "stride must be at least 1, got 0"),
        (
            ["evaluate", "{teacher}", "--data", "{data}", "--block", "32", "--stride", "33"],
            "stride must be from 1 to the 32 tokens of a block, got 33",
        ),
        (
            ["evaluate", "{teacher}", "--data", "{data}", "--teacher", "absent"],
            "--teacher must be a checkpoint directory",
        ),
        (["evaluate", "{teacher}", "--tasks", "x", "--teacher", "y"], "--teacher needs --data"),
        (
            ["evaluate", "absent", "--data", "{data}", "--batch-size", "0"],
            "--batch-size must be at least 1, got 0",
        ),
        (["evaluate", "absent", "--tasks", "x", "--limit", "0"], "--limit must be at least 1, got 0"),
        (
            ["finetune", "{teacher}", "{out}", "--data", "{data}", "--quant-seed", "-1"],
            "--quant-seed must be at least 0, got -1",
        ),
        (
            ["evaluate", "absent", "--data", "{data}", "--max-tokens", "0"],
            "--max-tokens must be at least 1, got 0",
        ),
        (
            ["evaluate", "{teacher}", "--data", "{data}", "--dtype", "int8"],
            "dtype must be float32, bfloat16 or",
        ),
        (["evaluate", "{teacher}", "--data", "absent.txt"], "no such file or directory: absent.txt"),
        (
            ["finetune", "{teacher}", "{out}", "--data", "{data}", "--start", "x", "--bpw", "1"],
            "--start must be",
        ),
        (["finetune", "{teacher}", "{out}", "--data", "{data}", "--bpw", "0.01"], "layer 'model.layers"),
        (["finetune", "{teacher}", "{out}", "--data", "{data}", "--lr", "0"], "lr must be a finite number"),
    ],
)
def test_errors_are_one_line(
    inputs: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # as if it were not installed
    names = {"teacher": inputs[0], "data": inputs[1], "out": tmp_path / "out"}
    extra = ["--no-tensorboard", "--quiet", "--block", "32"] if arguments[0] == "finetune" else []
    # What is not there or not installed is no wrong value.
    failed = re.search("pip install|directory", message)
    assert main([*(a.format(**names) for a in arguments), *extra]) == (1 if failed else 2)
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith(f"littlebit2 {arguments[0]}: error: ")
    assert message in last


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--limit", "3"], "--limit needs --tasks"),
        (["--include-path", "."], "--include-path needs --tasks"),
        (["--stride", "3"], "--stride needs --data"),
    ],
)
def test_what_is_of_no_use_is_refused(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = ["--tasks", "any"] if "data" in message else ["--data", str(tmp_path)]
    assert main(["evaluate", "nowhere", *text, *options]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [
        ["quantize", "nowhere", "OUT", "--bpw", "1"],
        ["quantize", "nowhere", "OUT", "--bpw", "1", "--data", "TEXT"],
        ["calibrate", "nowhere", "--data", "TEXT", "--out", "OUT"],
        ["write-text", "nowhere", "OUT.jsonl"],
    ],
)
def test_a_model_that_is_not_there_has_its_name(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = write_text(tmp_path / "text.txt", 100)
    places = {"OUT": str(tmp_path / "out"), "OUT.jsonl": str(tmp_path / "own.jsonl"), "TEXT": str(text)}
    assert main([places.get(word, word) for word in command]) == 1
    assert "MODEL_DIR must be the directory of a checkpoint" in capsys.readouterr().err
