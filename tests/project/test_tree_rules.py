"""The tree has no circles of imports and no crowded folders, and its words are spelled in one way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.project import tree_rules
from tests.project.import_rules import Finding

ROOT = Path(__file__).parents[2]

CHECKS = {
    "folders": tree_rules.folder_findings,
    "circles": tree_rules.circle_findings,
    "spelling": tree_rules.spelling_findings,
}


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
def test_tree_follows_the_rules(check: Callable[[Path], list[Finding]]) -> None:
    findings = check(ROOT)
    assert not findings, "\n" + "\n".join(map(str, findings))


def plant(root: Path, files: dict[str, str]) -> None:
    for path, text in files.items():
        target = root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, "utf-8")


@pytest.mark.parametrize(
    "folder", ["csrc/cuda", "littlebit2_kernels", "python/littlebit2", "tests/cpp", "benchmarks"]
)
def test_folder_rule_can_fail(tmp_path: Path, folder: str) -> None:
    names = [f"{folder}/{chr(97 + number)}" for number in range(tree_rules.MAX_FILES + 1)]
    plant(tmp_path, dict.fromkeys([f"{name}{'.py' if name[-1] < 'i' else '.h'}" for name in names[1:]], ""))
    plant(tmp_path, {f"{folder}/notes.md": "", f"{folder}/inner/x.py": ""})
    assert not tree_rules.folder_findings(tmp_path)
    plant(tmp_path, {f"{names[0]}.py": ""})
    (finding,) = tree_rules.folder_findings(tmp_path)
    assert finding.path == folder


CIRCLES = {
    "two-modules": {
        "littlebit2_kernels/a.py": "from . import b",
        "littlebit2_kernels/b.py": "import littlebit2_kernels.a",
    },
    "inside-functions": {
        "littlebit2_kernels/a.py": "def f():\n    from .b import g",
        "littlebit2_kernels/b.py": "class B:\n    def g(self):\n        from littlebit2_kernels import a",
    },
    "three-modules": {
        "python/littlebit2/x/a.py": "from ..b import f",
        "python/littlebit2/b.py": "from littlebit2.x.c import f",
        "python/littlebit2/x/c.py": "from .a import f",
    },
    "by-name": {
        "benchmarks/a.py": "import importlib\nimportlib.import_module('benchmarks.b')",
        "benchmarks/b.py": "from benchmarks.a import f",
    },
    "through-the-package": {
        "littlebit2_kernels/__init__.py": "from .a import f",
        "littlebit2_kernels/a.py": "from littlebit2_kernels import g",
    },
    "across-packages": {
        "littlebit2_kernels/a.py": "def f():\n    import littlebit2.b",
        "python/littlebit2/b.py": "from littlebit2_kernels.a import f",
    },
    "other-branch-of-type-checking": {
        "benchmarks/a.py": "if TYPE_CHECKING:\n    pass\nelse:\n    from benchmarks import b",
        "benchmarks/b.py": "from benchmarks.a import f",
    },
}


@pytest.mark.parametrize("files", CIRCLES.values(), ids=CIRCLES)
def test_circle_rule_can_fail(tmp_path: Path, files: dict[str, str]) -> None:
    plant(tmp_path, files)
    (finding,) = tree_rules.circle_findings(tmp_path)
    assert finding.message.count("->") == len(files)


ACYCLIC = {
    "type-checking-only": {
        "benchmarks/a.py": "import typing\nif typing.TYPE_CHECKING:\n    from benchmarks import b",
        "benchmarks/b.py": "from benchmarks.a import f",
    },
    "neighbors-in-a-package": {
        "littlebit2_kernels/__init__.py": "from .a import f\nfrom .b import g",
        "littlebit2_kernels/a.py": "from . import b\nimport littlebit2_kernels.b",
        "littlebit2_kernels/b.py": "import torch",
    },
    "diamond": {
        "benchmarks/a.py": "from benchmarks import b, c",
        "benchmarks/b.py": "from benchmarks import d",
        "benchmarks/c.py": "from benchmarks import d",
        "benchmarks/d.py": "",
    },
}


@pytest.mark.parametrize("files", ACYCLIC.values(), ids=ACYCLIC)
def test_circle_rule_permits(tmp_path: Path, files: dict[str, str]) -> None:
    plant(tmp_path, files)
    assert tree_rules.circle_findings(tmp_path) == []


def test_circles_are_counted_one_by_one() -> None:
    graph = {"a": {"b"}, "b": {"a", "c"}, "c": {"d"}, "d": {"e"}, "e": {"c"}, "f": {"a"}}
    assert tree_rules.circles(graph) == [["c", "d", "e"], ["a", "b"]]


def test_graph_sees_the_tree() -> None:
    graph = tree_rules.import_graph(ROOT)
    assert "littlebit2_kernels.format" in graph["littlebit2_kernels.linear"]
    assert any(name.startswith("littlebit2_kernels") for name in graph["littlebit2.train.layer"])
    assert {name.partition(".")[0] for name in graph} == {"benchmarks", "littlebit2", "littlebit2_kernels"}


# Put together, so that this file does not contain what the rule looks for.
BRITISH = [
    *(f"{stem}i" + "se" for stem in ("quant", "normal", "minim", "summar", "vector", "orthonormal")),
    *(f"initiali{'s'}{ending}" for ending in ("ed", "es", "er", "ing", "ation", "ations")),
    *(f"{stem}our" for stem in ("behavi", "col", "fav", "neighb")),
    "mode" + "lling",
    "cent" + "re",
    "analy" + "se",
    "gre" + "y",
]


@pytest.mark.parametrize("word", BRITISH)
@pytest.mark.parametrize("form", ["{}", "_{}_model", "a_{}", "un{}", "{}Model"])
def test_spelling_rule_can_fail(tmp_path: Path, word: str, form: str) -> None:
    text = form.format(word)
    if form == "un{}" and not word.startswith(("norm", "init", "quant")):
        text = word.capitalize()
    plant(tmp_path, {"docs/a.md": f"a line\n{text}\n"})
    (finding,) = tree_rules.spelling_findings(tmp_path)
    assert (finding.path, finding.line) == ("docs/a.md", 2)


def test_names_of_files_are_looked_at(tmp_path: Path) -> None:
    plant(tmp_path, {f"tests/test_{BRITISH[0]}.py": ""})
    (finding,) = tree_rules.spelling_findings(tmp_path)
    assert BRITISH[0] in finding.message


def test_spelling_rule_permits() -> None:
    text = (
        "otherwise precise noise raised promise revise arises elementwise surprises exercise advised premise "
        "quantize normalized initialization behavior color neighbor modeling center analyses analysis gray "
        "this basis called filled controller installed installing initial disable miser size rising concise"
    )
    assert tree_rules.british_words(text) == []
