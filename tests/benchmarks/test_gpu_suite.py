from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu_suite
from benchmarks.gpu_suite import STEPS, Step, main, run_step


def test_dry_run_understands_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert all(f"{step.name} (at most" in printed for step in STEPS)


def test_every_test_that_a_step_names_exists() -> None:
    commands = [step.command for step in STEPS if "pytest" in step.command]
    assert commands
    for command in commands:
        names = [part for part in command if part.startswith("tests/")]
        collected = subprocess.run(
            [sys.executable, "-m", "pytest", "--collect-only", "-q", *names],
            cwd=gpu_suite.ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert names
        assert collected.returncode == 0, collected.stdout


def test_steps_need_only_steps_before_them() -> None:
    names = [step.name for step in STEPS]
    for index, step in enumerate(STEPS):
        assert set(step.needs) <= set(names[:index]), step.name


def test_a_step_is_not_run_after_one_that_it_needs_failed(tmp_path: Path) -> None:
    fails = Step("first", (sys.executable, "-c", "print('why'); raise SystemExit(3)"), 60, ())
    first = run_step(fails, tmp_path, tmp_path, {})
    assert first.state == "failed with 3"
    assert Path(first.log).read_text().strip() == "why"
    marker = tmp_path / "ran"
    second = Step("second", (sys.executable, "-c", f"open({str(marker)!r}, 'w')"), 60, ("first",))
    assert run_step(second, tmp_path, tmp_path, {"first": first}).state == "skipped: first failed with 3"
    assert not marker.exists()
    assert run_step(second, tmp_path, tmp_path, {}).state == "passed"
    assert marker.exists()


def test_a_step_that_hangs_or_is_missing_is_reported(tmp_path: Path) -> None:
    hangs = Step("hangs", (sys.executable, "-c", "import time; time.sleep(60)"), 1, ())
    assert run_step(hangs, tmp_path, tmp_path, {}).state == "timed out"
    missing = Step("missing", ("no-such-program",), 1, ())
    assert run_step(missing, tmp_path, tmp_path, {}).state.startswith("failed: ")


def test_results_are_written_and_the_exit_status_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good = Step("build", (sys.executable, "-c", "print('{out}')"), 60, ())
    bad = Step("tests", (sys.executable, "-c", "raise SystemExit('reason')"), 60)
    monkeypatch.setattr(gpu_suite, "STEPS", (good, bad))
    assert main(["--out", str(tmp_path)]) == 1
    written = json.loads((tmp_path / "steps.json").read_text())
    assert [entry["state"] for entry in written] == ["passed", "failed with 1"]
    assert (tmp_path / "build.log").read_text().strip() == str(tmp_path)
    assert "reason" in capsys.readouterr().out
