"""The import hook by itself: what it does to modules that it waits for, and that it is in nobody's way."""

from __future__ import annotations

import copy
import functools
import importlib
import importlib.util
import json
import subprocess
import sys
import threading
import types
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integrations.installed.hook import ROOT, load_hook

hook = load_hook()

SOURCE = "import threading\nVALUE = {value}\nimported_by = threading.get_ident()\n"


@pytest.fixture(autouse=True)
def _undo_imports(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # Without the hook of an installed package.
    others = [finder for finder in sys.meta_path if "utoregister" not in f"{type(finder)} {finder}"]
    monkeypatch.setattr(sys, "meta_path", others)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        del sys.modules[name]
    importlib.invalidate_caches()


class Calls(list[Any]):
    """A function that keeps what it is called with."""

    def __call__(self, module: Any) -> None:
        self.append(module)


def package(folder: Path, value: int = 1) -> Path:
    (folder / "awaited").mkdir(parents=True)
    (folder / "awaited/__init__.py").write_text("")
    (folder / "awaited/inner.py").write_text(SOURCE.format(value=value))
    (folder / "awaited/other.py").write_text("")
    sys.path.insert(0, str(folder))
    return folder


def wait_for(name: str, function: Callable[[Any], None], position: int = 0) -> Any:
    finder = hook.AfterImport({name: function})
    sys.meta_path.insert(position, finder)
    return finder


def test_called_once_the_module_has_run(tmp_path: Path) -> None:
    package(tmp_path)
    seen = []
    wait_for("awaited.inner", lambda module: seen.append((module.VALUE, module.__loader__, module.__spec__)))
    module = importlib.import_module("awaited.inner")
    importlib.import_module("awaited.other")
    importlib.import_module("awaited.inner")
    ((value, loader, spec),) = seen
    assert value == 1
    # The module looks as without the hook.
    assert type(loader) is type(sys.modules["awaited.other"].__loader__)
    assert spec.loader is loader
    assert spec is module.__spec__


def test_reloading_calls_again(tmp_path: Path) -> None:
    package(tmp_path)
    calls = Calls()
    wait_for("awaited.inner", calls)
    module = importlib.import_module("awaited.inner")
    (tmp_path / "awaited/inner.py").write_text(SOURCE.format(value=22))
    importlib.invalidate_caches()
    assert importlib.reload(module).VALUE == 22
    assert calls == [module, module]


def test_failing_module_fails_as_it_would(tmp_path: Path) -> None:
    package(tmp_path)
    (tmp_path / "awaited/inner.py").write_text("raise KeyError('own failure')")
    calls = Calls()
    wait_for("awaited.inner", calls)
    with pytest.raises(KeyError, match="own failure"):
        importlib.import_module("awaited.inner")
    assert "awaited.inner" not in sys.modules
    with pytest.raises(ModuleNotFoundError, match=r"awaited\.missing"):
        importlib.import_module("awaited.missing")
    assert not calls


def test_module_that_is_not_there(tmp_path: Path) -> None:
    package(tmp_path)
    wait_for("awaited.missing", Calls())
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'awaited\.missing'"):
        importlib.import_module("awaited.missing")
    assert importlib.util.find_spec("awaited.missing") is None


def test_looking_at_a_spec_imports_nothing(tmp_path: Path) -> None:
    package(tmp_path)
    calls = Calls()
    wait_for("awaited.inner", calls)
    spec = importlib.util.find_spec("awaited.inner")
    assert spec is not None
    assert spec.loader is not None
    assert "VALUE = 1" in spec.loader.get_source("awaited.inner")  # type: ignore[attr-defined]
    assert copy.copy(spec.loader).is_package("awaited.inner") is False  # type: ignore[attr-defined]
    assert "awaited.inner" not in sys.modules
    assert not calls


def test_failing_function_becomes_a_warning(tmp_path: Path) -> None:
    package(tmp_path)

    def fail(module: Any) -> None:
        raise AttributeError("no such registry")

    wait_for("awaited.inner", fail)
    with pytest.warns(
        RuntimeWarning, match=r"after the import of awaited\.inner .*no such registry.*register"
    ):
        assert importlib.import_module("awaited.inner").VALUE == 1


def test_modules_in_archives(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "archive.zip", "w") as archive:
        archive.writestr("zipped/__init__.py", "")
        archive.writestr("zipped/inner.py", SOURCE.format(value=3))
    sys.path.insert(0, str(tmp_path / "archive.zip"))
    calls = Calls()
    wait_for("zipped.inner", calls)
    module = importlib.import_module("zipped.inner")
    assert calls == [module]
    assert type(module.__loader__).__name__ == "zipimporter"


class Searching:
    """A finder as hooks of other packages have it: it starts the search anew, and wraps what that finds."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.searching = False
        self.ran: list[str] = []

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != self.name or self.searching:
            return None
        self.searching = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.searching = False
        assert spec is not None
        assert spec.loader is not None
        execute = spec.loader.exec_module

        def exec_module(module: types.ModuleType) -> None:
            execute(module)
            self.ran.append(module.__name__)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


@pytest.mark.parametrize("ours_first", [True, False])
def test_beside_another_hook(tmp_path: Path, ours_first: bool) -> None:
    package(tmp_path)
    theirs = Searching("awaited.inner")
    sys.meta_path.insert(0, theirs)
    calls = Calls()
    wait_for("awaited.inner", calls, 0 if ours_first else 1)
    module = importlib.import_module("awaited.inner")
    assert calls == [module]
    assert theirs.ran == ["awaited.inner"]
    assert module.VALUE == 1


def test_finder_that_is_no_modern_one(tmp_path: Path) -> None:
    package(tmp_path)
    calls = Calls()
    wait_for("awaited.inner", calls)
    sys.meta_path.insert(1, object())  # type: ignore[arg-type]
    sys.modules.pop("awaited", None)
    spec = sys.meta_path[0].find_spec("awaited.inner", [str(tmp_path / "awaited")])
    assert spec is not None


def test_threads_that_import_together(tmp_path: Path) -> None:
    package(tmp_path)
    calls = Calls()
    wait_for("awaited.inner", calls)
    start = threading.Barrier(8)
    found = []

    def work() -> None:
        start.wait()
        found.append(importlib.import_module("awaited.inner"))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert found == [calls[0]] * 8


def test_which_tensors_may_be_packed(tmp_path: Path) -> None:
    def header(**dtypes: str) -> bytes:
        entries = {f"model.{name}": {"dtype": dtype} for name, dtype in dtypes.items()}
        text = json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode()
        return len(text).to_bytes(8, "little") + text

    assert hook._integer_tensors(tmp_path) == set()
    for name in ("training_args.bin", "optimizer.pt", "notes.txt"):
        (tmp_path / name).touch()
    assert hook._integer_tensors(tmp_path) == set()
    (tmp_path / "pytorch_model.bin").touch()
    assert hook._integer_tensors(tmp_path) == {"pytorch_model.bin"}
    # Where there are safetensors, transformers reads those.
    (tmp_path / "a.safetensors").write_bytes(header(weight="BF16", words="I32"))
    (tmp_path / "b.safetensors").write_bytes(header(bits="U8", scale="F32", table="I64"))
    assert hook._integer_tensors(tmp_path) == {"words", "bits", "table"}
    for content in (b"", b"1234", b"\xff" * 8, b"\x04" + bytes(7) + b"[1]x", b"\x02" + bytes(7) + b"[]"):
        (tmp_path / "a.safetensors").write_bytes(content)
        assert hook._integer_tensors(tmp_path) == {"bits", "table"}


def test_folders_and_files_that_cannot_be_looked_into(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.safetensors").symlink_to(tmp_path / "nothing")
    assert hook._integer_tensors(tmp_path) == set()

    def refuse(path: str) -> list[str]:
        raise PermissionError(path)

    monkeypatch.setattr(hook.os, "listdir", refuse)
    assert hook._integer_tensors(tmp_path) == set()


def test_headers_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = json.dumps({"model.words": {"dtype": "I32"}}).encode()
    (tmp_path / "a.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    assert hook._integer_tensors(tmp_path) == {"words"}
    monkeypatch.setattr(hook, "_header", lambda path: pytest.fail("read again"))
    assert hook._integer_tensors(tmp_path) == {"words"}


def line_of_the_pth_file() -> str:
    (line,) = (ROOT / "python/littlebit2_autoregister.pth").read_text("utf-8").splitlines()
    return line


def test_starting_imports_nothing(tmp_path: Path) -> None:
    (tmp_path / "line.py").write_text(
        "import os, sys\nbefore = set(sys.modules)\n"
        + line_of_the_pth_file()
        + "\nprint(sorted(set(sys.modules) - before), sys.meta_path[0].__name__)"
    )
    run = subprocess.run(
        [sys.executable, "-S", tmp_path / "line.py"], capture_output=True, text=True, check=True
    )
    assert run.stdout == "[] LittleBit2Autoregister\n"


def test_finder_of_the_pth_file_gives_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once transformers is looked for, another finder takes its place, and the search goes on behind it."""
    monkeypatch.delenv("LB2_NO_AUTOREGISTER", raising=False)
    monkeypatch.setitem(sys.modules, "_littlebit2_autoregister", hook)
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers"]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "transformers/quantizers").mkdir(parents=True)
    (tmp_path / "transformers/__init__.py").write_text("FAKE = True")
    (tmp_path / "transformers/quantizers/__init__.py").write_text("")
    registries = "AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING = {}, {}"
    (tmp_path / "transformers/quantizers/auto.py").write_text(registries)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    theirs = Searching("transformers")
    exec(line_of_the_pth_file())
    waiting = sys.meta_path[0]
    sys.meta_path.insert(0, theirs)
    before = list(sys.meta_path)
    importlib.import_module("json.tool")
    assert sys.meta_path == before
    assert importlib.import_module("transformers").FAKE
    assert theirs.ran == ["transformers"]
    assert waiting not in sys.meta_path
    assert type(sys.meta_path[1]) is hook.AfterImport
    assert [*sys.meta_path[:1], *sys.meta_path[2:]] == [*before[:1], *before[2:]]
    auto = importlib.import_module("transformers.quantizers.auto")
    assert auto.AUTO_QUANTIZER_MAPPING["littlebit2"].is_stand_in
    # A second .pth file, of another folder of packages.
    exec(line_of_the_pth_file())
    importlib.util.find_spec("transformers")
    importlib.reload(sys.modules["transformers"])
    assert sum(type(finder) is hook.AfterImport for finder in sys.meta_path) == 1


def test_directories_are_looked_at_below_wrappers_of_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class PreTrainedConfig:
        @classmethod
        def get_config_dict(cls, path: Any, **kwargs: Any) -> Any:
            return {"quant_func": "x"}, {}

    hook._watch(types.SimpleNamespace(PreTrainedConfig=PreTrainedConfig))
    ours = vars(PreTrainedConfig)["get_config_dict"].__func__

    @functools.wraps(ours)
    def theirs(cls: type, path: Any, **kwargs: Any) -> Any:
        return ours(cls, path, **kwargs)

    PreTrainedConfig.get_config_dict = classmethod(theirs)  # type: ignore[assignment]
    calls = Calls()

    def register() -> None:
        calls(None)

        def get_config_dict(cls: type, path: Any, **kwargs: Any) -> Any:
            return "described", theirs(cls, path, **kwargs)

        get_config_dict._littlebit2_original = theirs  # type: ignore[attr-defined]
        PreTrainedConfig.get_config_dict = classmethod(get_config_dict)  # type: ignore[assignment]

    monkeypatch.setitem(sys.modules, hook.HOME, types.SimpleNamespace(register=register))
    for _ in range(2):
        assert PreTrainedConfig.get_config_dict(tmp_path) == ("described", ({"quant_func": "x"}, {}))
    assert len(calls) == 1
    assert PreTrainedConfig.get_config_dict("organization/model")[0] == "described"


def test_installing_twice_and_late(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = types.ModuleType("awaited_late")
    calls = Calls()
    monkeypatch.setitem(sys.modules, "awaited_late", loaded)
    monkeypatch.setattr(hook, "_FUNCTIONS", {"awaited_late": calls})
    before = len(sys.meta_path)
    hook.install()
    hook.install()
    assert len(sys.meta_path) == before + 1
    assert calls == [loaded]
