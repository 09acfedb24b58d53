"""``python -m benchmarks`` from end to end, on tiny layers; nothing here looks at a measured time."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.__main__ import main
from benchmarks.commands import COMMANDS
from benchmarks.layers import candidates as candidates_module
from benchmarks.layers.goal_results import GOALS
from benchmarks.layers.rows import load_document
from benchmarks.records import read_result

ROOT = Path(__file__).parents[2]
TINY = ["--repetitions", "1", "--seconds", "1e-6", "--cold-mib", "0.05", "--no-floors"]
RUN = ["sweep", "--shapes", "128,96", "--bpw", "1", "--tokens", "1", "3", *TINY]


def test_every_command_has_help_without_heavy_imports() -> None:
    code = """
import sys
from benchmarks.commands import COMMANDS, command_parser, overview_parser
overview_parser().format_help()
for name in COMMANDS:
    assert "usage: python -m benchmarks " + name in command_parser(name).format_help()
print([name for name in ("torch", "numpy", "matplotlib", "littlebit2_kernels") if name in sys.modules])
"""
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout == "[]\n"


def test_the_overview_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    for name, command in COMMANDS.items():
        assert re.search(rf"^    {name} +{re.escape(command.help)}$", printed, re.MULTILINE)
    for arguments in ([], ["no-such-command"]):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 2


def test_there_is_one_way_in() -> None:
    folder = ROOT / "benchmarks"
    entries = {p.relative_to(folder) for p in folder.rglob("*.py") if "__name__ ==" in p.read_text("utf-8")}
    # Beside it the GPU suite, which needs nothing installed, and the processes that it starts.
    started = {p for p in entries if p.parent == Path("cuda/suite")}
    assert entries - started == {Path("__main__.py"), Path("gpu_suite.py")}


def test_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    json, table = tmp_path / "rows.json", tmp_path / "rows.csv"
    names = ["littlebit2:portable", "dense", "low-rank", "gemlite"]
    before = torch.get_num_threads()
    arguments = ["--candidates", *names, "--dtypes", "bfloat16", "--refcheck"]
    assert main([*RUN, *arguments, "--json", str(json), "--csv", str(table)]) == 0
    assert torch.get_num_threads() == before
    document = load_document(json)
    labels = {row.label for row in document.rows}
    # Peers come in float32 too, whatever the dtype of the activations.
    assert labels == {
        "littlebit2:portable bfloat16",
        "dense bfloat16",
        "dense float32",
        "low-rank bfloat16",
        "low-rank float32",
    }
    assert len(document.rows) == len(labels) * 2 * 2
    assert {row.error is not None for row in document.rows if row.ours} == {True}
    assert document.unavailable == {"gemlite bfloat16": "gemlite runs on CUDA tensors, not on cpu"}
    with table.open(newline="", encoding="utf-8") as file:
        assert len(list(csv.DictReader(file))) == len(document.rows)
    output = capsys.readouterr()
    assert "not measured: gemlite bfloat16" in output.err
    assert "| 128->96 |" in output.out

    assert main(["table", str(json)]) == 0
    assert capsys.readouterr().out.count("| 128->96 |") == len(document.rows)


def test_sweep_with_an_error_past_its_bound(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(x: torch.Tensor, packed: object) -> torch.Tensor:
        return torch.full((x.shape[0], 96), float("nan"))

    arguments = [*RUN, "--candidates", "littlebit2:portable", "--modes", "hot"]
    monkeypatch.setattr(candidates_module, "littlebit_linear", wrong)
    assert main(arguments) == 0
    capsys.readouterr()
    assert main([*arguments, "--refcheck"]) == 1
    output = capsys.readouterr()
    assert "relative error must be at most 2.0e-06, got inf" in output.err
    assert "> bound" in output.out


def test_goals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    json = tmp_path / "goals.json"
    methods = ["--exact", "littlebit2:portable", "--int16", "littlebit2:portable"]
    shapes = ["--shapes", "128,96", "96,128", "--bpw", "1"]
    assert main(["goals", *shapes, *methods, *TINY, "--quick", "--json", str(json)]) == 0
    printed = capsys.readouterr().out
    # Neither the shapes nor, but for one, the bpw of the goals.
    in_part = len(GOALS) - 2 * 4
    assert f"0 of {len(GOALS)} goals met, {in_part} measured in part, 8 not measured" in printed
    assert "M=1 vs dense bfloat16, cold" in printed
    assert "M=128 vs low-rank bfloat16, cold" in printed
    document = load_document(json)
    assert len(document.goals) == len(GOALS)
    measured = [goal for goal in document.goals if goal["measured"] is not None]
    # All but three dense ones at other bpw and the 70B one, of either method.
    assert len(measured) == in_part
    assert {goal["met"] for goal in document.goals} == {None}
    assert {(check.inputs, check.dtype) for check in document.checks} == {
        ("normal", "float32"),
        ("full", "float32"),
        ("outliers", "bfloat16"),
    }

    assert main(["goals", "--from", str(json), *methods]) == 0
    again = capsys.readouterr().out
    assert again[again.index("| method") :] == printed[printed.index("| method") :]


def test_goals_without_the_candidates(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(candidates_module.Module, "unavailable", lambda self, device: "not built")
    assert main(["goals", *TINY]) == 0
    output = capsys.readouterr().out
    assert output.count("not built") == len(GOALS)
    assert f"0 of {len(GOALS)} goals met, 0 measured in part, {len(GOALS)} not measured" in output


def test_floors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "floors.json"
    assert main(["floors", "--threads", "1", "--mib", "0.01", "--size", "8", "--json", str(path)]) == 0
    assert "matmul float32 GMAC/s" in capsys.readouterr().out
    content = read_result(path, ("floors",))
    assert [floor["threads"] for floor in content["floors"]] == [1]
    assert content["command"].startswith("python -m benchmarks floors --threads 1")
    assert content["settings"]["size"] == 8


def test_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    json = tmp_path / "rows.json"
    assert main([*RUN, "--candidates", "littlebit2:portable", "dense", "--json", str(json)]) == 0
    capsys.readouterr()
    assert main(["plot", str(json), "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.split() == [
        str(tmp_path / name) for name in ("roofline.png", "speedup.png", "latency.png")
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--candidates", "fast"], "candidate must be one of .* got 'fast'"),
        (["--candidates", "gemlite"], "candidates must hold one that can run, none of them can"),
        (["--shapes", "big"], "shape must be K,N or one of .* got 'big'"),
        (["--dtypes", "int8"], "dtype must be one of .* got 'int8'"),
        pytest.param(
            ["--device", "cuda"],
            "device 'cuda' cannot be used: torch finds no usable GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
        (["--threads", "100000"], "threads must be at most .* got 100000"),
        (["--memory-gib", "1e-9"], "weights of 128,96 at 1 bpw must fit"),
        (["--bpw", "1e-6"], "bpw"),
    ],
)
def test_bad_requests(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    candidates = ["--candidates", "littlebit2:portable"]
    assert main([*RUN, *candidates, *arguments]) == 2
    assert re.search("error: .*" + message, capsys.readouterr().err)


@pytest.mark.parametrize("value", ["0", "-1", "x", "nan"])
def test_numbers_must_be_positive(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["sweep", f"--seconds={value}"])
    assert f"must be a positive float, got '{value}'" in capsys.readouterr().err


def test_missing_document(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["table", str(tmp_path / "none.json")]) == 2
    assert "none.json" in capsys.readouterr().err


def test_processors_are_seen_through_pinning() -> None:
    code = "import benchmarks, torch, os; print(len(benchmarks.PROCESSORS))"
    counts = []
    for variables in ({}, {"OMP_PROC_BIND": "true", "OMP_PLACES": "threads"}):
        result = subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={**os.environ, **variables},
            capture_output=True,
            text=True,
            check=True,
        )
        counts.append(int(result.stdout))
    assert counts[0] == counts[1]
