"""Text that a model writes itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from littlebit2 import quantize_blockwise, write_text
from littlebit2.cli import main
from littlebit2.disk import RunError
from littlebit2.own_text import run as own_text
from littlebit2.own_text.chats import ChatForm
from littlebit2.own_text.writer import Writer
from littlebit2.quantize import QuantConfig
from littlebit2.train.data import find_files

transformers = pytest.importorskip("transformers")

from tests.blockwise.builders import QUICK, BlockwiseSettings, write_model  # noqa: E402

CHATML = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
INST = (
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
)
OPTIONS: dict[str, Any] = {"tokens": 300, "length": 16, "batch_size": 4, "progress": False}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "dense")


def with_template(model: Path, template: str | None) -> Any:
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(model)
    return tokenizer


def lines(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text("utf-8").splitlines()]


@pytest.mark.parametrize(
    ("template", "before", "end"), [(CHATML, "<user>", "</><assistant>"), (INST, "[INST] ", "[/INST]")]
)
def test_the_form_of_chats_is_read_off_the_template(
    template: str, before: str, end: str, model: Path
) -> None:
    form = ChatForm.of(with_template(model, template))
    assert (form.before, form.end) == (before, end)
    assert form.question(f" why? {end} because") == "why?"
    assert form.asked("why?") == f"{before}why?{' ' if template == INST else ''}{end}"
    assert form.answered("why?", "so").startswith(f"{before}why?")
    assert "so" in form.answered("why?", "so")


def test_texts_are_of_both_kinds(model: Path, tmp_path: Path) -> None:
    with_template(model, CHATML)
    out = tmp_path / "own.jsonl"
    done = write_text(model, out, **{**OPTIONS, "length": 48, "tokens": 1500})
    texts = lines(out)
    assert done.texts == len(texts)
    assert done.tokens >= 1500
    chats = [text for text in texts if text.startswith("<user>")]
    assert 0 < done.chats == len(chats) < len(texts)
    assert all("</><assistant>" in text for text in chats)
    share = sum(len(text.encode()) for text in chats) / sum(len(text.encode()) for text in texts)
    assert 0.2 < share < 0.8
    # Free texts begin with words.
    assert all(text[0].isalpha() for text in texts if text not in chats)
    assert not out.with_name("own.jsonl.partial").exists()


def test_without_a_template_texts_are_free(model: Path, tmp_path: Path) -> None:
    done = write_text(model, tmp_path / "own.jsonl", **OPTIONS)
    assert done.chats == 0
    assert len(set(lines(tmp_path / "own.jsonl"))) > done.texts // 2
    with pytest.raises(ValueError, match="chats must be 0 where the tokenizer has no chat template"):
        write_text(model, tmp_path / "b.jsonl", chats=0.5, **OPTIONS)


class _Killed(Exception):
    pass


def test_a_killed_run_goes_on_to_the_same_bytes(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_text(model, tmp_path / "whole.jsonl", **OPTIONS)
    drawn = 0
    free = Writer.free

    def counted(self: Writer, count: int) -> list[tuple[str, int]]:
        nonlocal drawn
        drawn += 1
        if drawn == 3:
            raise _Killed
        return free(self, count)

    monkeypatch.setattr(Writer, "free", counted)
    out = tmp_path / "own.jsonl"
    with pytest.raises(_Killed):
        write_text(model, out, **OPTIONS)
    assert not out.exists()
    with pytest.raises(RunError, match="seed = 0 there, 5 here"):
        write_text(model, out, seed=5, **OPTIONS)
    write_text(model, out, **OPTIONS)
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    write_text(model, tmp_path / "other.jsonl", seed=5, **OPTIONS)
    assert (tmp_path / "other.jsonl").read_bytes() != out.read_bytes()


def test_a_measured_dtype_stays_that_of_the_run(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "own.jsonl"
    loaded: list[Any] = []

    class Dying(Writer):
        def __init__(self, dense: Any, *args: Any, **named: Any) -> None:
            super().__init__(dense, *args, **named)
            loaded.append(dense.dtype)

        def free(self, count: int) -> list[tuple[str, int]]:
            if len(loaded) == 1:
                raise _Killed
            return super().free(count)

    monkeypatch.setattr(own_text, "Writer", Dying)
    measured = ["bfloat16", "float32", "float32"]
    monkeypatch.setattr(own_text, "resolve_precision", lambda *_: measured.pop(0))
    with pytest.raises(_Killed):
        write_text(model, out, **OPTIONS)
    write_text(model, out, **OPTIONS)
    assert write_text(model, out, **OPTIONS).was_there
    assert loaded[:2] == [torch.bfloat16, torch.bfloat16]
    record = out.with_name("own.jsonl.report.json")
    assert json.loads(record.read_text())["dtype"] == "torch.bfloat16"
    write_text(model, out, resume=False, overwrite=True, **OPTIONS)
    assert loaded[3] == torch.float32
    assert json.loads(record.read_text())["dtype"] == "torch.float32"


def test_a_model_is_tuned_on_its_own_text(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "own.jsonl"
    arguments = ["write-text", str(model), str(out), "--tokens", "2000", "--length", "16", "--quiet"]
    assert main(arguments) == 0
    assert f"--data {out}" in capsys.readouterr().out
    report = quantize_blockwise(
        model,
        tmp_path / "out",
        QuantConfig(ranks=(16,), method="admm", admm_iterations=5, refine_rounds=1),
        [out],
        BlockwiseSettings(**QUICK),
        progress=False,
    )
    assert all(entry["after"] < entry["before"] for entry in report.blocks)


def test_a_finished_text_is_left_as_it_is(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "own.jsonl"
    arguments = ["write-text", str(model), str(out), "--tokens", "100", "--length", "16", "--quiet"]
    assert main(arguments) == 0
    first, before = capsys.readouterr(), out.stat()
    assert first.err == ""
    assert find_files(tmp_path) == [out]  # the record of what it was written with is no text
    # Killed after the text was there.
    work = tmp_path / "own.jsonl.partial"
    work.mkdir()
    (work / "littlebit2.lock").touch()
    for again in (arguments, [*arguments, "--overwrite"]):
        assert main(again) == 0
        printed = capsys.readouterr()
        assert (
            printed.err == f"{out} was finished before, with the same settings; --restart writes it again\n"
        )
        assert printed.out.split(", ")[:3] == first.out.split(", ")[:3]
        assert out.stat() == before
        assert not work.exists()
    # What is something else is not written over.
    assert main([*arguments, "--seed", "1"]) == 1
    assert "; it is not what this call would write: seed = 0 there, 1 here" in capsys.readouterr().err
    assert main([*arguments, "--restart"]) == 1
    assert "--overwrite" in capsys.readouterr().err
    text = out.read_bytes()
    out.write_text("mine")
    assert main(arguments) == 1
    assert "what is in it was changed" in capsys.readouterr().err
    assert main([*arguments, "--overwrite"]) == 0
    assert out.read_bytes() == text
    assert capsys.readouterr().err == ""
    written = out.stat().st_mtime_ns
    assert main([*arguments, "--overwrite", "--restart"]) == 0
    assert out.stat().st_mtime_ns > written
    (tmp_path / "own.jsonl.report.json").write_text("{}")
    assert main(["write-text", "nowhere", *arguments[2:]]) == 1
    assert "out must be a new file" in capsys.readouterr().err.replace("OUT", "out")
    out.unlink()
    assert main(arguments) == 1
    assert "own.jsonl.report.json; --overwrite" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": 0}, "tokens must be an integer of at least 1, got 0"),
        ({"length": 3}, "length must be an integer of at least 8, got 3"),
        ({"batch_size": True}, "batch_size must be an integer of at least 1, got True"),
        ({"chats": 1.5}, r"chats must be in \[0, 1\], got 1.5"),
        ({"temperature": 0.0}, "temperature must be positive and finite, got 0.0"),
        ({"top_k": -1}, "top_k must be an integer of at least 0, got -1"),
        ({"dtype": "int8"}, "dtype must be float32, bfloat16 or float16, got 'int8'"),
    ],
)
def test_wrong_arguments(changes: dict[str, Any], message: str, model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        write_text(model, tmp_path / "own.jsonl", **{**OPTIONS, **changes})
    with pytest.raises(ValueError, match=r"out must be named \*\.jsonl, got 'own.txt'"):
        write_text(model, tmp_path / "own.txt", **OPTIONS)
