"""The format of results: round trips, atomic writing, refusals, and what describes the machine."""

from __future__ import annotations

import json
import subprocess
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from benchmarks.layers.rows import Check
from benchmarks.records import (
    SCHEMA,
    cpu_model,
    describe_environment,
    environment,
    git_state,
    host_environment,
    read_result,
    write_result,
)

OPTIONS = Namespace(
    command="sweep", arguments=["sweep", "--shapes", "a b"], run=print, out=Path("x"), tokens=[1]
)
HEAD = {"schema": SCHEMA, "benchmark": "sweep", "command": "", "environment": {}, "settings": {}}


def test_round_trip(tmp_path: Path) -> None:
    check = Check("a", "float32", "s", 1.0, "normal", 1e-7)
    path = write_result(tmp_path / "deep" / "rows.json", OPTIONS, {"device": "d"}, checks=[check], count=3)
    assert [p.name for p in path.parent.iterdir()] == ["rows.json"]
    content = read_result(path, ("sweep", "goals"))
    assert content["command"] == "python -m benchmarks sweep --shapes 'a b'"
    assert content["environment"] == {"device": "d"}
    assert content["settings"] == {"out": "x", "tokens": [1]}
    assert Check(**content["checks"][0]) == check
    assert content["count"] == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "must be a JSON file of `python -m benchmarks`"),
        ("[]", f"must have schema {SCHEMA}, got None"),
        (json.dumps({"schema": SCHEMA + 1}), f"must have schema {SCHEMA}, got {SCHEMA + 1}"),
        (json.dumps({"schema": SCHEMA}), "it lacks benchmark, command, environment, settings"),
        (
            json.dumps({**HEAD, "benchmark": "predict"}),
            "must be a result of sweep or goals, got one of 'predict'",
        ),
    ],
)
def test_unreadable_results_are_refused(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(content, "utf-8")
    with pytest.raises(ValueError, match=message):
        read_result(path, ("sweep", "goals"))


def test_stored_results_can_be_read() -> None:
    folder = Path(__file__).parents[2] / "benchmarks" / "results"
    paths = sorted(folder.glob("*.json"))
    assert paths
    for path in paths:
        content = read_result(path, ("goals", "whole-model", "predict", "experts", "load-memory", "serving"))
        assert content["command"].startswith(f"python -m benchmarks {content['benchmark']}")
        assert content["environment"]["git"]["commit"]


def test_environment_tells_what_a_figure_needs() -> None:
    about = environment(torch.device("cpu"), [1, 2])
    assert about["versions"]["torch"]
    assert about["threads"] == [1, 2]
    assert {"device", "isa", "affinity", "variables", "date", "git", "load_average"} <= set(about)
    assert about["device"] in describe_environment(about)
    assert set(host_environment()) < set(about)


def test_git_state(tmp_path: Path) -> None:
    assert git_state(tmp_path) is None
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], [*identity, "commit", "-q", "--allow-empty", "-m", "x"]):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    state = git_state(tmp_path)
    assert state is not None
    assert len(state["commit"]) == 40
    assert not state["dirty"]
    (tmp_path / "file").touch()
    assert git_state(tmp_path) == {**state, "dirty": True}


def test_cpu_model(tmp_path: Path) -> None:
    path = tmp_path / "cpuinfo"
    assert cpu_model(path) is None
    path.write_text("processor\t: 0\n", "utf-8")
    assert cpu_model(path) is None
    path.write_text(
        "model name\t: Chip: fast\ncpu family\t: 6\nmodel\t\t: 106\n\nmodel name\t: other\n", "utf-8"
    )
    assert cpu_model(path) == "Chip: fast (family 6, model 106)"
