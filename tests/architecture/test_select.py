"""Patterns on names, and the modules that a model itself calls heads or ties."""

from __future__ import annotations

import argparse
import inspect

import pytest
from torch import nn

from littlebit2.architecture.select import (
    DEFAULT_EXCLUDE,
    check_patterns,
    is_selected,
    keeps_heads_dense,
    output_heads,
    tied_names,
)
from littlebit2.cli.common import add_pattern_options, excluded
from littlebit2.offline import measure_ranks, quantize_checkpoint
from littlebit2.plan import plan_model


class Model(nn.Module):
    """An embedding, two linear layers and a head of an unusual name, tied on demand."""

    def __init__(self, *, tied: bool) -> None:
        super().__init__()
        self.wte = nn.Embedding(16, 8)
        self.up = nn.Linear(8, 8)
        self.alias = self.up
        self.to_vocabulary = nn.Linear(8, 16, bias=False)
        if tied:
            self.to_vocabulary.weight = self.wte.weight

    def get_output_embeddings(self) -> nn.Module:
        return self.to_vocabulary


@pytest.mark.parametrize("tied", [False, True])
def test_heads_and_ties_are_found_in_the_model(tied: bool) -> None:
    model = Model(tied=tied)
    assert output_heads(model) == {"to_vocabulary"}
    # A module under two names is no tie.
    assert tied_names(model) == ({"to_vocabulary"} if tied else set())


def test_every_name_of_a_head_counts() -> None:
    model = Model(tied=False)
    model.second = model.to_vocabulary
    assert output_heads(model) == {"to_vocabulary", "second"}


def test_a_model_may_have_no_head() -> None:
    assert output_heads(nn.Sequential(nn.Linear(8, 8))) == set()


def test_two_linear_layers_of_one_weight_are_tied() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    model[2].weight = model[0].weight
    assert tied_names(model) == {"0", "2"}


@pytest.mark.parametrize(
    "name", ["lm_head", "model.lm_head", "score", "classifier", "classifier.dense", "qa_outputs"]
)
def test_heads_are_excluded_by_default(name: str) -> None:
    assert not is_selected(name, ["*"], DEFAULT_EXCLUDE)


def test_exclude_wins() -> None:
    assert is_selected("layers.0.up", ["*.up"], ["*.down"])
    assert not is_selected("layers.0.up", ["*.up"], ["layers.0.*"])
    assert not is_selected("layers.0.UP", ["*.up"], [])


def test_heads_stay_dense_with_all_default_patterns() -> None:
    assert keeps_heads_dense([*DEFAULT_EXCLUDE, "*.down_proj"])
    assert not keeps_heads_dense(DEFAULT_EXCLUDE[1:])


def test_patterns_are_strings() -> None:
    assert check_patterns("include", "*.up") == ("*.up",)
    with pytest.raises(TypeError, match=r"exclude must hold strings, got 3"):
        check_patterns("exclude", ["a", 3])  # type: ignore[list-item]


@pytest.mark.parametrize("function", [quantize_checkpoint, measure_ranks, plan_model])
def test_the_api_has_one_default(function: object) -> None:
    assert inspect.signature(function).parameters["exclude"].default is DEFAULT_EXCLUDE  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], [*DEFAULT_EXCLUDE]),
        (["--exclude", "*.down_proj"], [*DEFAULT_EXCLUDE, "*.down_proj"]),
        (["--head", "packed"], []),
        (["--head", "packed", "--exclude", "score"], ["score"]),
    ],
)
def test_the_command_line_has_the_default_of_the_api(arguments: list[str], expected: list[str]) -> None:
    parser = argparse.ArgumentParser()
    add_pattern_options(parser)
    assert excluded(parser.parse_args(arguments)) == expected
