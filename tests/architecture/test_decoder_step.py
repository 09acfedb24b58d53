"""Which statements of an attention become one call of a step, and which do not."""

from __future__ import annotations

import ast
from typing import Any

import pytest
import torch

from littlebit2.architecture.decoder.rotary import Rotation
from littlebit2.architecture.decoder.step import with_step

SOURCE = """
def forward(self, x, angles, mask=None, cache=None, **kwargs):
    q, k, v = self.project(x)
    cos, sin = angles
    q, k = turn(q, k, cos, sin)
    if cache is not None:
        k, v = cache.update(k, v, self.layer_idx)
    interface: Any = FUNCTIONS.get_interface(self.config.name, fallback)
    out, weights = interface(self, q, k, v, mask, dropout=0.0 if not self.training else self.rate, **kwargs)
    out = self.output(out)
    return out, weights
"""


def rotation(name: str) -> Rotation | None:
    return Rotation(torch.add, False, False, False) if name == "turn" else None


def changed(source: str) -> str | None:
    (tree,) = ast.parse(source).body
    assert isinstance(tree, ast.FunctionDef)
    before = ast.unparse(tree)
    if with_step(tree, "self", rotation):
        return ast.unparse(tree)
    assert ast.unparse(tree) == before
    return None


def test_the_statements_become_a_branch() -> None:
    text = changed(SOURCE)
    assert text is not None
    call = (
        "_littlebit2_attended = self._littlebit2_attend(turn, "
        "FUNCTIONS.get_interface(self.config.name, fallback), q, k, v, cos, sin, cache, self.layer_idx, "
        "mask, dropout=0.0 if not self.training else self.rate, **kwargs)"
    )
    lines = [line.strip() for line in text.splitlines()]
    assert lines.count(call) == 1
    assert lines[-4:] == [
        "else:",
        "out, weights = _littlebit2_attended",
        "out = self.output(out)",
        "return (out, weights)",
    ]
    # The statements as they were are the other branch.
    assert set(ast.unparse(ast.parse(SOURCE)).replace("    ", "").splitlines()[1:]) <= set(lines)


class _Calls:
    """A module of an attention, with everything that its ``forward`` calls; remembers what it does."""

    training, rate, layer_idx = False, 0.5, 3

    def __init__(self, step: Any) -> None:
        self.done: list[Any] = []
        self.config = self
        self.name = "name"
        self._step = step

    def project(self, x: Any) -> Any:
        return "q", "k", "v"

    def output(self, x: Any) -> Any:
        return f"output of {x}"

    def update(self, *given: Any) -> Any:
        self.done.append(("update", *given))
        return "all k", "all v"

    def get_interface(self, *given: Any) -> Any:
        return self.interface

    def interface(self, *given: Any, **settings: Any) -> Any:
        self.done.append((*given[1:], settings))
        return "apart", None

    def _littlebit2_attend(self, *given: Any, **settings: Any) -> Any:
        self.done.append((*given[2:7], *given[8:], settings))
        return self._step


@pytest.mark.parametrize("step", [None, ("together", None)])
def test_either_branch_does_its_own(step: Any) -> None:
    text = changed(SOURCE)
    assert text is not None
    module = _Calls(step)
    names: dict[str, Any] = {
        "FUNCTIONS": module,
        "fallback": None,
        "turn": lambda *given: ("turned q", "turned k"),
    }
    exec(text.replace(": Any", ""), names)
    got = names["forward"](module, "x", ("cos", "sin"), "mask", module, more=1)
    settings = {"dropout": 0.0, "more": 1}
    asked = ("q", "k", "v", "cos", "sin", 3, "mask", settings)
    if step is None:
        assert got == ("output of apart", None)
        assert module.done == [
            asked,
            ("update", "turned k", "v", 3),
            ("turned q", "all k", "all v", "mask", settings),
        ]
    else:
        assert got == ("output of together", None)
        assert module.done == [asked]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("turn(q, k, cos, sin)", "other(q, k, cos, sin)"),
        ("turn(q, k, cos, sin)", "turn(q, k, sin=sin, cos=cos)"),
        ("q, k = turn(q, k,", "q, k = turn(k, q,"),
        ("q, k = turn", "k, q = turn"),
        ("q, k = turn(q, k, cos, sin)", "q, k = turn(q, k, *angles, sin)"),
        ("cache is not None:", "cache is None:"),
        ("cache is not None:", "other is not None:"),
        ("self.layer_idx)\n", "self.layer_idx)\n    else:\n        k = k + 1\n"),
        ("self.layer_idx)\n", "self.layer_idx)\n        k = k + 1\n"),
        ("cache.update(k, v, self.layer_idx)", "cache.update(v, k, self.layer_idx)"),
        ("cache.update(k, v, self.layer_idx)", "cache.update(k, v, self.layer_idx, {})"),
        ("cache.update(k, v, self.layer_idx)", "cache.update(k, v, count())"),
        ("cache.update(", "cache.change("),
        ("    interface: Any", "    k = k + 1\n    interface: Any"),
        ("FUNCTIONS.get_interface(", "FUNCTIONS.made("),
        ("self.config.name,", "count(),"),
        ("self.config.name,", "k.name,"),
        ("interface(self, q, k, v, mask,", "interface(self, q, k, v, None,"),
        ("interface(self, q, k, v, mask,", "interface(self, q, k, k, mask,"),
        ("interface(self, q, k, v, mask,", "interface(q, k, v, mask,"),
        ("interface(self,", "another(self,"),
        ("mask, dropout", "mask, scaling=k, dropout"),
        ("mask, dropout", "mask, scaling=count(), dropout"),
        ("out, weights = interface", "both = interface"),
        ("self.output(out)", "self.output(out + q)"),
        ("self.output(out)", "self.output(out, k)"),
        ("self.output(out)", "interface(out)"),
        ("turn(q, k, cos, sin)", "turn(q, k, k, sin)"),
    ],
)
def test_other_statements_stay(old: str, new: str) -> None:
    assert SOURCE.count(old) == 1
    assert changed(SOURCE.replace(old, new)) is None


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("interface: Any =", "interface ="),
        ("mask, dropout", "mask, window=getattr(self.config, 'window', None), dropout"),
        ("self.output(out)", "self.output(out + weights)"),
        ("out, weights = interface", "out, k = interface"),
    ],
)
def test_what_may_differ(old: str, new: str) -> None:
    assert SOURCE.count(old) == 1
    assert changed(SOURCE.replace(old, new)) is not None
