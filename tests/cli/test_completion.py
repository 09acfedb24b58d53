"""``littlebit2 completion``: what a shell completes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from littlebit2.cli import build_parser, main
from littlebit2.cli.completion import _actions
from tests.cli.test_cli import COMMANDS


def completed(script: Path, *words: str) -> set[str]:
    """What bash offers for the last of the words of a command line."""
    code = (
        'source "$1"; shift; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))\n'
        "complete -p littlebit2 >&2 || exit 9\n"
        '_shtab_littlebit2 littlebit2 "${COMP_WORDS[COMP_CWORD]}"; printf \'%s\\n\' "${COMPREPLY[@]}"'
    )
    done = subprocess.run(
        ["bash", "--norc", "-c", code, "bash", str(script), *words],
        cwd=script.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return {word.strip().rstrip("/") for word in done.stdout.splitlines() if word.strip()}


@pytest.fixture
def script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    pytest.importorskip("shtab")
    assert main(["completion", "bash"]) == 0
    path = tmp_path / "completion.bash"
    path.write_text(capsys.readouterr().out, "utf-8")
    return path


def test_bash_completes_commands_options_choices_and_paths(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert completed(script, "littlebit2", "quan") == {"quantize"}
    assert set(COMMANDS) <= completed(script, "littlebit2", "")
    assert completed(script, "littlebit2", "quantize", "--distill-s") == {
        "--distill-steps",
        "--distill-samples",
        "--distill-scale-lr",
    }
    assert completed(script, "littlebit2", "convert", "a", "b", "--to", "") == {"littlebit", "littlebit2"}
    (script.parent / "models").mkdir()
    (script.parent / "more.txt").touch()
    assert completed(script, "littlebit2", "quantize", "mo") == {"models"}
    assert completed(script, "littlebit2", "quantize", "--data", "mo") == {"models", "more.txt"}


def test_zsh_knows_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab")
    assert main(["completion", "zsh"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("#compdef littlebit2")
    assert all(command in text for command in COMMANDS)


def test_metavars_of_paths_are_known() -> None:
    from littlebit2.cli import completion

    found = {action.metavar for action in _actions(build_parser())}
    assert not (completion._DIRECTORIES | completion._FILES) - found


def test_without_the_library_one_line_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("littlebit2._messages.find_spec", lambda name: None)
    assert main(["completion", "bash"]) == 1
    assert capsys.readouterr().err == (
        "littlebit2 completion: error: shtab is not installed; pip install 'littlebit2-kernels[completion]'\n"
    )
    assert main(["completion", "fish"]) == 2


def test_neither_the_script_nor_the_version_needs_torch() -> None:
    code = (
        "import sys, littlebit2.cli as cli; c = cli.main(sys.argv[1:]); "
        "heavy = {'torch', 'transformers', 'numpy'} & set(sys.modules); assert not heavy, heavy\n"
        "assert c == 0\n"
        "assert 'shtab' not in sys.modules or sys.argv[1] == 'completion'"
    )
    for arguments in (["--version"], ["completion", "bash"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
