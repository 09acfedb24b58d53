"""docs/models.md: what a sweep found, for people who look for their model."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from .classes import model_types
from .trial import FAILED, NOT_BUILT, REFUSED, WORKS, Outcome

__all__ = ["INPUT_KINDS", "input_kind", "markdown"]

#: Kinds of model by what they are fed with.
INPUT_KINDS = ("text", "vision", "audio", "multimodal", "other")

_HEAD = """\
# Model families

This page lists, for every model type of transformers {transformers}, whether `littlebit2 quantize`,
`littlebit2.load`, `from_pretrained`, `quantize_` and `save_pretrained` work. Each type is tried with a tiny
random model of one class: quantized from its files and in memory, loaded, saved, and loaded again. Its
outputs are compared with those of the dense model with the dequantized weights. "Compared" counts the types
for which the sweep knows an input that the dense model takes, also in bfloat16 where the dense model does.

Written by `python -m benchmarks families --resume --markdown docs/models.md`, with torch {torch}.
Results are of {commits}.
{count} of {all} types were tried and took {minutes:.0f} minutes of CPU time.
`make test-families` runs the whole sweep, `make test-slow` a sample of it.

Tiny models show that names, shapes and code fit together. They say nothing about quality.
"""


def input_kind(outcome: Outcome) -> str:
    """Return which of :data:`INPUT_KINDS` a model is."""
    takes = set(outcome.takes)
    if takes == {"text"}:
        return "text"
    if takes and takes <= {"image", "video"}:
        return "vision"
    if takes == {"audio"}:
        return "audio"
    return "multimodal" if len(takes) > 1 else "other"


def markdown(outcomes: Sequence[Outcome], versions: Mapping[str, Any]) -> str:
    """Return the content of docs/models.md.

    Args:
        outcomes: of the sweep.
        versions: of packages, by name.
    """
    head = _HEAD.format(
        transformers=versions.get("transformers"),
        torch=versions.get("torch"),
        commits=_commits(outcomes),
        count=len(outcomes),
        all=len(model_types()),
        minutes=sum(one.seconds for one in outcomes) / 60,
    )
    by_kind = {kind: [one for one in outcomes if one.kind == kind] for kind in (FAILED, REFUSED, NOT_BUILT)}
    compared = [one for one in outcomes if one.kind == WORKS and one.compared]
    untried = [one for one in outcomes if one.kind == WORKS and not one.compared]
    return "\n".join(
        [
            head,
            *_counts(outcomes),
            *_reasons("FAILED", "Quantized, but not right afterwards: faults.", by_kind[FAILED]),
            *_reasons("Refused", "Nothing is written, and the message says why.", by_kind[REFUSED]),
            *_reasons(
                "Not built",
                "The sweep could not make a small dense model: nothing is said about such a family.",
                by_kind[NOT_BUILT],
            ),
            *_reasons(
                "Works, not compared",
                "Quantizes, loads and saves; the sweep knows no input that the dense model takes.",
                untried,
            ),
            "## Works",
            "",
            *_lists(compared),
            *_untried(outcomes),
        ]
    )


def _commits(outcomes: Sequence[Outcome]) -> str:
    """Where a sweep was resumed after a change, its results are of several commits."""
    found = Counter(one.commit for one in outcomes)
    listed = ", ".join(f"{commit} ({count} types)" for commit, count in found.most_common())
    return f"commit{'s' if len(found) > 1 else ''} {listed}"


def _counts(outcomes: Sequence[Outcome]) -> list[str]:
    lines = [
        "| input | types | works | compared | refused | not built | FAILED |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for kind in (*INPUT_KINDS, "all"):
        of_kind = [one for one in outcomes if kind in ("all", input_kind(one))]
        if not of_kind:
            continue
        numbers = [
            len(of_kind),
            sum(one.kind == WORKS for one in of_kind),
            sum(one.compared for one in of_kind),
            *(sum(one.kind == result for one in of_kind) for result in (REFUSED, NOT_BUILT, FAILED)),
        ]
        lines.append(f"| {kind} | " + " | ".join(map(str, numbers)) + " |")
    return [*lines, ""]


def _reasons(title: str, text: str, outcomes: Sequence[Outcome]) -> list[str]:
    """A section that lists model types with their reasons."""
    if not outcomes:
        return []
    rows = [
        f"| {one.model_type} | {one.model} | {(one.reason or one.not_compared).replace('|', '/')} |"
        for one in sorted(outcomes, key=lambda one: one.model_type)
    ]
    return [f"## {title}", "", text, "", "| model type | class | reason |", "|---|---|---|", *rows, ""]


def _untried(outcomes: Sequence[Outcome]) -> list[str]:
    """Types that the sweep, interrupted, has not reached."""
    left = sorted(set(model_types()) - {one.model_type for one in outcomes})
    if not left:
        return []
    text = f"The sweep was stopped before these {len(left)} types: {', '.join(left)}."
    return ["## Not tried", "", *_wrapped(text), ""]


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, 120, break_on_hyphens=False, break_long_words=False)


def _lists(outcomes: Sequence[Outcome]) -> list[str]:
    lines = []
    for kind in INPUT_KINDS:
        names = sorted(one.model_type for one in outcomes if input_kind(one) == kind)
        if names:
            text = f"**{kind}** ({len(names)}): {', '.join(names)}."
            lines += [*_wrapped(text), ""]
    return lines
