from __future__ import annotations

import subprocess
import sys
import time
from itertools import chain
from pathlib import Path

import pytest

from benchmarks.__main__ import main
from benchmarks.cuda import gpu_suite
from benchmarks.cuda.gpu_suite import STEPS, Folders, Step, run_step
from benchmarks.records import read_result


def test_dry_run_understands_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gpu-suite", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert all(f"{step.name} (at most" in printed for step in STEPS)


def test_every_test_that_a_step_names_exists() -> None:
    commands = [step.command for step in STEPS if "pytest" in step.command]
    named = [[part for part in command if part.startswith("tests/")] for command in commands]
    assert commands
    assert all(named)
    collected = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", *chain.from_iterable(named)],
        cwd=gpu_suite.ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert collected.returncode == 0, collected.stdout


def test_steps_need_only_steps_before_them() -> None:
    names = [step.name for step in STEPS]
    for index, step in enumerate(STEPS):
        assert set(step.needs) <= set(names[:index]), step.name


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    return Folders(tmp_path, tmp_path, tmp_path)


def step(name: str, *command: str, seconds: int = 60, needs: tuple[str, ...] = ()) -> Step:
    return Step(name, "check", command, seconds, needs)


def test_every_group_fits_into_ten_minutes_and_eight_files() -> None:
    groups = {step.group for step in STEPS} - {"setup"}
    assert groups == {
        "check",
        "decode",
        "variants",
        "triton",
        "prefill",
        "prefill-triton",
        "prefill-variants",
        "models",
    }
    for group in groups:
        steps = [step for step in STEPS if step.group in ("setup", group)]
        assert sum(step.seconds for step in steps) <= 570, group
        written = {part for step in steps for part in step.command if part.startswith("{out}/")}
        assert len(written) + len({"suite.json", "suite.log"}) <= 8, group


def test_a_step_is_not_run_after_one_that_it_needs_failed(folders: Folders, tmp_path: Path) -> None:
    first = run_step(step("first", sys.executable, "-c", "print('why'); raise SystemExit(3)"), folders, {})
    assert first.state == "failed with 3"
    assert Path(first.log).read_text().strip() == "why"
    marker = tmp_path / "ran"
    second = step("second", sys.executable, "-c", f"open({str(marker)!r}, 'w')", needs=("first",))
    assert run_step(second, folders, {"first": first}).state == "skipped: first failed with 3"
    assert run_step(second, folders, {}, 0.5).state == "skipped: out of time"
    assert not marker.exists()
    assert run_step(second, folders, {}).state == "passed"
    assert marker.exists()


def test_a_step_that_hangs_or_is_missing_is_reported(folders: Folders) -> None:
    hangs = step("hangs", sys.executable, "-c", "import time; time.sleep(60)", seconds=1)
    assert run_step(hangs, folders, {}).state == "timed out"
    assert run_step(step("missing", "no-such-program"), folders, {}).state.startswith("failed: ")


def test_what_a_step_leaves_running_is_ended(folders: Folders, tmp_path: Path) -> None:
    later = tmp_path / "later"
    forks = step("forks", "sh", "-c", f"(sleep 2; touch {later}) & sleep 60", seconds=1)
    assert run_step(forks, folders, {}).state == "timed out"
    time.sleep(2.5)
    assert not later.exists()


def test_results_are_written_and_the_exit_status_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good = Step("build", "setup", (sys.executable, "-c", "print('{out}')"), 60, ())
    bad = Step("tests", "check", (sys.executable, "-c", "raise SystemExit('reason')"), 60)
    monkeypatch.setattr(gpu_suite, "STEPS", (good, bad))
    monkeypatch.setattr(gpu_suite, "ROOT", tmp_path)
    assert main(["gpu-suite", "--out", str(tmp_path / "out")]) == 1
    written = read_result(tmp_path / "out" / "suite.json", ("gpu-suite",))["steps"]
    assert [entry["state"] for entry in written] == ["passed", "failed with 1"]
    assert (tmp_path / "out" / "suite.log").read_text().splitlines() == [
        "=== build: passed",
        str(tmp_path / "out"),
        "",
        "=== tests: failed with 1",
        "reason",
        "",
    ]
    assert "reason" in capsys.readouterr().out
    assert main(["gpu-suite", "--out", str(tmp_path / "out"), "--steps", "build"]) == 0
