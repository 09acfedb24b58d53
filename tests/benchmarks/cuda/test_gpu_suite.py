from __future__ import annotations

import re
import subprocess
import sys
import time
from argparse import Namespace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from benchmarks.__main__ import main
from benchmarks.cuda import gpu_suite
from benchmarks.cuda.suite import one_call, running, stand_in
from benchmarks.cuda.suite.groups import CALL_SECONDS, GROUPS, STEPS
from benchmarks.cuda.suite.running import Run, batches, limit_of, plan
from benchmarks.cuda.suite.steps import Folders, Result, Step, run_step
from benchmarks.cuda.suite.summary import MOST_LINES, summary
from benchmarks.layers.rows import load_document
from benchmarks.records import ROOT, read_result

#: Options that make a step's command a dry run: from end to end on the CPU, small, without taking times.
SMALL = {
    "sweep": "--device cpu --shapes 256,128 --tokens 1 --bpw 1 --cold-mib 0.05 --unit-times",
    "tune-triton": "--dry-run --shapes 2048,2048",
    "whole-model": "--device cpu --shape tiny --steps generate --bpw 1 --prompt 4 --tokens 3 --rounds 1",
}


def everything(step: Step) -> str:
    return ""


def named(group: str) -> list[str]:
    return [step.name for step in STEPS if step.group == group]


@pytest.fixture
def folders(tmp_path: Path) -> Folders:
    return Folders(tmp_path, tmp_path, tmp_path / "carry")


# --- the table of steps --------------------------------------------------------------------------------


def test_benchmarks_understand_their_commands(tmp_path: Path, folders: Folders) -> None:
    """The first step of each command runs on the CPU; all are parsed in the rehearsals below."""
    first = {}
    for step in STEPS:
        arguments = step.arguments(folders)
        if arguments[1:3] == ["-m", "benchmarks"]:
            first.setdefault(arguments[3], arguments[3:])
    assert set(first) == set(SMALL)
    for name, arguments in first.items():
        output = ["--json", str(tmp_path / f"{name}.json")] if "--json" in arguments else []
        assert main([*arguments, *SMALL[name].split(), *output]) == 0


def test_every_test_that_a_step_names_exists() -> None:
    commands = [step.command for step in STEPS if "pytest" in step.command]
    tests = [[part for part in command if part.startswith("tests/")] for command in commands]
    assert len(commands) >= 7
    assert all(tests)
    collected = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", *chain.from_iterable(tests)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert collected.returncode == 0, collected.stdout


def test_steps_need_only_steps_before_them() -> None:
    names = [step.name for step in STEPS]
    assert len(set(names)) == len(names)
    for index, step in enumerate(STEPS):
        assert set(step.needs) <= set(names[:index]), step.name


def test_every_group_fits_into_a_call() -> None:
    assert GROUPS[0] == "first"
    assert len(GROUPS) == 10
    for group in GROUPS:
        steps, left = plan(STEPS, named(group), everything)
        assert not left
        assert limit_of(steps) <= CALL_SECONDS, group


def test_what_takes_times_runs_alone() -> None:
    for group in GROUPS:
        steps, _ = plan(STEPS, named(group), everything)
        for batch in batches(steps):
            names = {step.name for step in batch}
            assert len(batch) == 1 or not any(step.result for step in batch), names
            assert not any(names & set(step.needs) for step in batch), names
    sizes = [len(batch) for batch in batches(plan(STEPS, named("first"), everything)[0])]
    assert sizes.count(3) == 2  # what is made, and the tests


def test_a_group_that_cannot_run_does_nothing(folders: Folders) -> None:
    steps, left = plan(STEPS, named("gemlite"), lambda step: step.left_out(folders))
    assert steps == []
    assert [result.state for result in left] == ["left out: wheels/gemlite-*.whl was not carried along"] * 2
    (folders.carry / "wheels").mkdir(parents=True)
    (folders.carry / "wheels" / "gemlite-1-py3-none-any.whl").touch()
    steps, left = plan(STEPS, named("gemlite"), lambda step: step.left_out(folders))
    assert [step.name for step in steps][:3] == ["build", "diagnostics", "gemlite-wheel"]
    assert not left


def test_tools_are_looked_for_where_they_are_used(folders: Folders) -> None:
    step = Step("profile", "first", ("true",), 1, tool="no-such-tool")
    assert step.left_out(folders) == "left out: no-such-tool is not on this machine"
    assert step.left_out(folders, elsewhere=True) == ""


# --- one step --------------------------------------------------------------------------------------------


def make_step(name: str, *command: str, seconds: int = 60, needs: tuple[str, ...] = (), **more: Any) -> Step:
    return Step(name, "check", command, seconds, needs, **more)


def python(name: str, script: str, **more: Any) -> Step:
    return make_step(name, sys.executable, "-c", script, **more)


def test_a_step_is_not_run_after_one_that_it_needs_failed(folders: Folders, tmp_path: Path) -> None:
    first = run_step(python("first", "print('why'); raise SystemExit(3)"), folders, {})
    assert first.state == "failed with 3"
    assert first.bad
    assert first.tail.strip() == "why"
    marker = tmp_path / "ran"
    second = python("second", f"open({str(marker)!r}, 'w')", needs=("first",))
    assert run_step(second, folders, {"first": first}).state == "skipped: first failed with 3"
    assert run_step(second, folders, {}, 0.5).state == "skipped: out of time"
    assert not marker.exists()
    assert run_step(second, folders, {}).state == "passed"
    assert marker.exists()


def test_a_step_that_hangs_or_is_missing_is_reported(folders: Folders) -> None:
    hangs = python("hangs", "import time; time.sleep(60)", seconds=1)
    assert run_step(hangs, folders, {}).state == "timed out"
    assert run_step(make_step("missing", "no-such-program"), folders, {}).state.startswith("failed: ")


def test_what_a_step_leaves_running_is_ended(folders: Folders, tmp_path: Path) -> None:
    later = tmp_path / "later"
    forks = make_step("forks", "sh", "-c", f"(sleep 2; touch {later}) & sleep 60", seconds=1)
    assert run_step(forks, folders, {}).state == "timed out"
    time.sleep(2.5)
    assert not later.exists()


def test_a_step_finds_the_tree_and_has_its_variables(folders: Folders) -> None:
    script = "import os, benchmarks, littlebit2; print(os.environ['LB2_CUDA_CHAINED'])"
    result = run_step(python("finds", script, variables=(("LB2_CUDA_CHAINED", "0"),)), folders, {})
    assert (result.state, result.tail) == ("passed", "0\n")


# --- a call ------------------------------------------------------------------------------------------------


def options(**values: Any) -> Namespace:
    return Namespace(command="gpu-suite", arguments=["gpu-suite"], run=None, **values)


def states(run: Run) -> dict[str, str]:
    return {name: result.state for name, result in run.done.items()}


def test_a_call_goes_on_where_the_last_one_stopped(tmp_path: Path, folders: Folders) -> None:
    count = tmp_path / "count"
    good = python("good", f"open({str(count)!r}, 'a').write('x')", result="good.json")
    fails_once = python(
        "once",
        f"import os; p = {str(tmp_path / 'once')!r}; ok = os.path.exists(p); open(p, 'w'); exit(not ok)",
    )
    (tmp_path / "good.json").write_text("{}")  # of something before

    def call(*resumed: Path) -> Run:
        run = Run(options(), folders, "some", ())
        run.run([good, fails_once], [], run.earlier(resumed), time.monotonic() + 60)
        return run

    first = call()
    assert states(first) == {"good": "passed", "once": "failed with 1"}
    assert first.done["good"].measured is None
    second = call()
    assert states(second) == {"good": "passed", "once": "passed"}
    assert second.done["good"].reused
    assert count.read_text() == "x"
    # On another machine there is only what is brought along.
    (tmp_path / "work" / "state").mkdir(parents=True)
    elsewhere = Folders(tmp_path / "out", tmp_path / "work", folders.carry)
    run = Run(options(), elsewhere, "some", ())
    assert set(run.earlier([])) == set()
    assert set(run.earlier([folders.out / "some.json"])) == {"good", "once"}
    with pytest.raises(ValueError, match=r"--resume: .* must be a JSON file of gpu-suite"):
        run.earlier([count])


def test_results_of_other_sources_are_not_taken(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(options(), folders, "some", ())
    run.run([python("good", "")], [], {}, time.monotonic() + 60)
    assert set(Run(options(), folders, "some", ()).earlier([])) == {"good"}
    monkeypatch.setattr(running, "_digest", lambda: "other")
    assert Run(options(), folders, "some", ()).earlier([]) == {}


def test_what_was_measured_before_time_ran_out_is_kept(tmp_path: Path, folders: Folders) -> None:
    part = str(tmp_path / "part.jsonl")
    script = f"import time; open({part!r}, 'w').write('{{\"a\": 1}}\\n'); time.sleep(60)"
    run = Run(options(), folders, "some", ())
    step = python("part", script, seconds=1, result="part.jsonl")
    run.run([step, python("next", "")], [], {}, time.monotonic() + 60)
    assert states(run) == {"part": "timed out", "next": "passed"}
    written = read_result(tmp_path / "some.json", ("gpu-suite",))["steps"]
    assert written[0]["measured"] == [{"a": 1}]


def test_setup_is_not_run_for_nothing(folders: Folders) -> None:
    setup = Step("build", "setup", (sys.executable, "-c", "raise SystemExit(1)"), 60, ())
    good = python("good", "", needs=("build",))
    run = Run(options(), folders, "some", ())
    run.run([setup, good], [], {"good": Result("good", "passed", reused=True)}, time.monotonic() + 60)
    assert states(run) == {"good": "passed"}


# --- the command -------------------------------------------------------------------------------------------


def rehearse(out: Path, *groups: str) -> dict[str, Any]:
    assert main(["gpu-suite", *groups, "--rehearse", "--out", str(out), "--work", str(out / "work")]) == 0
    return read_result(out / f"{'-'.join(groups)}.json", ("gpu-suite",))


def test_rehearsal_of_the_first_call(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = rehearse(tmp_path, "first")
    assert content["rehearsal"]
    done = {entry["name"]: entry for entry in content["steps"]}
    assert set(named("first")) < set(done)
    assert {entry["state"] for entry in done.values()} == {"passed"}
    for name in named("first"):
        step = next(step for step in STEPS if step.name == name)
        assert (done[name]["measured"] is not None) == bool(step.result), name
    files = sorted(path.name for path in tmp_path.iterdir() if path.is_file())
    assert files == ["first.json", "first.log", "first.md"]
    page = (tmp_path / "first.md").read_text()
    assert len(page.splitlines()) <= MOST_LINES
    assert page in capsys.readouterr().out
    for part in ("A rehearsal", "3 passed", "b1.and.popc", "us unchained", "over gemlite", "| L2 hits"):
        assert part in page, part
    # A rehearsal is no result to go on from.
    assert running.earlier_results([tmp_path / "first.json"], content["sources"]) == {}
    assert main(["gpu-suite", "--extract", str(tmp_path / "first.json"), "--out", str(tmp_path / "e")]) == 0
    assert load_document(tmp_path / "e" / "first-decode.json").rows


@pytest.mark.parametrize("groups", [GROUPS[1:5], GROUPS[5:]], ids=["next", "rest"])
def test_rehearsal_of_the_other_groups(tmp_path: Path, groups: tuple[str, ...]) -> None:
    done = {entry["name"]: entry["state"] for entry in rehearse(tmp_path, *groups)["steps"]}
    assert {name for group in groups for name in named(group)} < set(done)
    assert set(done.values()) == {"passed"}


def test_stand_ins_refuse_what_the_commands_would(folders: Folders) -> None:
    assert stand_in.main([sys.executable, "-m", "pytest", "tests/cuda/no_such_test.py"]) == 4
    assert stand_in.main(["sudo"]) == 2
    with pytest.raises(SystemExit):
        stand_in.main([sys.executable, "-m", "benchmarks", "sweep", "--no-such-option"])


def test_plan_says_what_runs_and_how_long(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gpu-suite", "--carry", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    headings = re.findall(r"^([\w-]+): at most (\d+) s, (\d+) s with those before$", printed, re.MULTILINE)
    assert [name for name, *_ in headings] == list(GROUPS)
    assert int(headings[-1][2]) == sum(int(limit) for _, limit, _ in headings)
    assert all(step.name in printed for step in STEPS if not step.wheel)
    assert main(["gpu-suite", "first", "--plan", "--carry", str(tmp_path)]) == 0
    assert "decode: at most" not in capsys.readouterr().out


def test_a_failure_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = Step("tests", "first", (sys.executable, "-c", "raise SystemExit('reason')"), 60, ())
    allowed = Step(
        "profile", "first", (sys.executable, "-c", "raise SystemExit('no')"), 60, (), optional=True
    )
    folders = ["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    monkeypatch.setattr(gpu_suite, "STEPS", (bad, allowed))
    assert main(["gpu-suite", "first", *folders]) == 1
    assert re.search(r"\| tests +\| 0 +\| failed with 1 +\| reason", capsys.readouterr().out)
    assert "=== tests: failed with 1\nreason\n" in (tmp_path / "out" / "first.log").read_text()
    monkeypatch.setattr(gpu_suite, "STEPS", (allowed,))
    assert main(["gpu-suite", "first", *folders]) == 0
    assert main(["gpu-suite", "second", *folders]) == 2
    assert "GROUP must be prepare or one of first, decode" in capsys.readouterr().err


def test_the_script_is_the_command() -> None:
    script = [sys.executable, str(ROOT / "benchmarks" / "gpu_suite.py"), "first", "--plan"]
    done = subprocess.run(script, cwd="/", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("first: at most")


def test_summary_reads_what_the_profiler_prints() -> None:
    head = ("ID", "Process ID", "Kernel Name", "Block Size", "Grid Size", "Section Name", "Metric Name")
    speed = "GPU Speed Of Light Throughput"
    lines = [
        (*head, "Metric Unit", "Metric Value"),
        ("0", "1", "decode", "(256, 1, 1)", "(76, 1, 1)", speed, "Duration", "us", "3.07"),
        (
            "0",
            "1",
            "decode",
            "(256, 1, 1)",
            "(76, 1, 1)",
            "Launch Statistics",
            "Registers Per Thread",
            "",
            "127",
        ),
        ("1", "1", "decode", "(256, 1, 1)", "(224, 1, 1)", speed, "Duration", "us", "1,234"),
    ]
    quoted = [",".join(f'"{cell}"' for cell in line) for line in lines]
    table = "\n".join(("==PROF== Connected to process 1", *quoted))
    page = summary("first", [Result("profile", "passed", measured=table)], {}, rehearsal=False)
    assert re.search(r"\| time +\| 3.07 us +\| 1,234 us", page)
    assert re.search(r"\| registers +\| 127 +\| +\|", page)
    assert "rehearsal" not in page


def test_the_profiled_call_is_made(capsys: pytest.CaptureFixture[str]) -> None:
    assert one_call.main("cpu") == 0
    assert "3 calls, norm of the result" in capsys.readouterr().out
