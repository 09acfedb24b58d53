"""Take the measurements that the goals ask for: one thread, the four large shapes, float32 peers.

Methods that are timed in another dtype are compared with peers in that dtype too, in the same groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from benchmarks.layers.candidates import Candidate, parse_candidate
from benchmarks.layers.refcheck import error_of, torch_error
from benchmarks.layers.rows import Check, Row
from benchmarks.layers.sweeping import Case, Entry, Sweep
from benchmarks.problems import Problem, dtype_name
from benchmarks.shapes import Shape
from littlebit2_kernels.reference import linear_reference

__all__ = ["METHOD_DTYPES", "accuracy", "goal_cases", "measure_goals"]

#: Dtype of the activations that each method is timed with.
METHOD_DTYPES = {"exact": torch.float32, "int16": torch.bfloat16}
TOKENS = (1, 8, 32, 128)
#: Tokens of one accuracy check, and one channel in how many is an outlier.
ACCURACY_TOKENS = 8
OUTLIER_EVERY = 128


def goal_cases(methods: Sequence[Candidate], *, two_threads: bool, repetitions: int) -> list[Case]:
    """What to interleave on one problem.

    Args:
        methods: our candidates.
        two_threads: whether to time our candidates on two threads too, in the group of M = 1 cold.
        repetitions: rounds of M = 1; slower calls get fewer.
    """
    ours = [Entry(candidate, 1) for candidate in methods]
    doubled = [Entry(candidate, 2) for candidate in methods] if two_threads else []
    # The goals are about float32; what the same activations cost a peer in their own dtype is shown beside.
    dtypes = dict.fromkeys([torch.float32, *(candidate.dtype for candidate in methods)])
    low_rank, dense = (
        [Entry(parse_candidate(name, dtype), 1) for dtype in dtypes] for name in ("low-rank", "dense")
    )
    cases = [
        Case(1, "cold", [*ours, *doubled, *low_rank, *dense], repetitions),
        Case(1, "hot", [*ours, low_rank[0]], repetitions),
    ]
    for tokens in TOKENS[1:]:
        rounds = max(3, repetitions // 2) if repetitions >= 3 else repetitions
        cases.append(Case(tokens, "cold", [*ours, *low_rank], rounds))
    return cases


def accuracy(problem: Problem, names: Mapping[str, str]) -> Iterator[Check]:
    """Errors of the methods' candidates against float64.

    ``normal`` and ``full``: float32 activations, so that the output is not rounded to 16 bits; values that
    bfloat16 holds, for which the int16 mode is made, and any. ``outliers``: bfloat16 activations, some
    channels 50 times larger, beside torch's own error in bfloat16.

    Args:
        problem: the layer.
        names: by method, the candidate.
    """
    outliers = max(1, problem.shape.in_features // OUTLIER_EVERY)
    x = problem.activations(ACCURACY_TOKENS)
    cases = (
        ("normal", x.bfloat16().float()),
        ("full", x),
        ("outliers", problem.activations(ACCURACY_TOKENS, outliers=outliers).bfloat16()),
    )
    packed = problem.packed
    truths = linear_reference(torch.cat([x.double() for _, x in cases]), packed).split(ACCURACY_TOKENS)
    for (inputs, x), truth in zip(cases, truths, strict=True):
        own = torch_error(truth, x, packed) if inputs == "outliers" else None
        for name in names.values():
            candidate = parse_candidate(name, x.dtype)
            built = candidate.build(problem)
            with torch.inference_mode():
                actual = built.bind(built.holder)(x)
            yield Check(
                candidate=name,
                dtype=dtype_name(x.dtype),
                shape=problem.shape.name,
                bpw=problem.bpw,
                inputs=inputs,
                error=error_of(actual, truth, x, packed),
                torch_error=own,
            )


def measure_goals(
    sweep: Sweep,
    *,
    shapes: Sequence[Shape],
    bpws: Sequence[float],
    names: Mapping[str, str],
    threads: int,
    progress: Callable[[str], None],
) -> Iterator[Row | Check]:
    """Measure everything, problem by problem.

    Args:
        sweep: measures the rows.
        shapes: layers.
        bpws: counted bits per weight.
        names: by method, a candidate that can run.
        threads: threads that this machine has.
        progress: told what comes next.
    """
    methods = [parse_candidate(name, METHOD_DTYPES[method]) for method, name in names.items()]
    for shape in shapes:
        for bpw in bpws:
            progress(f"{shape.name} at {bpw:g} bpw")
            problem = Problem(shape, bpw, device=sweep.settings.device)
            two = threads >= 2 and shape.name.startswith("llama2-70b-")
            cases = goal_cases(methods, two_threads=two, repetitions=sweep.settings.repetitions)
            yield from sweep.measure(problem, cases)
            yield from accuracy(problem, names)
