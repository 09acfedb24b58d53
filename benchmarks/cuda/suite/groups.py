"""The steps, by group, in the order of what is to be known first.

A group with the steps that it needs fits into one call of ten minutes, and writes three files.
"""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.cuda.suite.steps import PYTHON, Step

__all__ = ["CALL_SECONDS", "GROUPS", "STEPS", "UNCHAINED"]

#: What all steps of a call may take; a little under ten minutes, so that results are written in time.
CALL_SECONDS = 560

OURS = [f"littlebit2:cuda:{mode}" for mode in ("int16", "float16", "int8", "sign")]
TRITON = [f"littlebit2:triton:{mode}" for mode in ("exact", "float16", "int8", "sign")]
#: Those of the goals first: a measurement that runs out of time keeps what it has.
PEERS = ["dense", "low-rank"]
FIRST_SHAPES = ["llama2-70b-up", "llama2-7b-qo"]
MODEL_SHAPES = [
    *("llama2-70b-up", "llama2-7b-up", "llama2-7b-qo"),
    *("llama2-70b-down", "llama2-7b-down", "llama3-8b-kv"),
]
PREFILL_SHAPES = ["llama2-70b-up", "llama2-7b-qo", "llama2-7b-up"]

#: Launches one after another, without programmatic dependent launch.
UNCHAINED = (("LB2_CUDA_CHAINED", "0"),)
#: What a measurement needs: one wrong result in a thousand problems is no reason to measure nothing.
_USABLE = ("build", "diagnostics")

_PYTEST = (PYTHON, "-m", "pytest", "-q", "--maxfail=20", "-p", "no:cacheprovider")
#: Each process has its own context on the GPU, and the reference in float64 is the CPU's work.
_TOGETHER = ("-n", "7", "--dist", "load")
_ONE_THREAD = (("OMP_NUM_THREADS", "1"),)
_FIRST_CALLS = "tests/cuda/test_first_call.py"
_MAKE = (PYTHON, "-m", "benchmarks.cuda.suite.make")
_TO_MAKE = ("--work", "{work}", "--carry", "{carry}", "--arch", "{arch}")
_TUNE = (PYTHON, "-m", "benchmarks", "tune-triton", "--bpw", "0.1")


def _measure(
    name: str,
    group: str,
    seconds: int,
    why: str,
    tokens: Sequence[int],
    candidates: Sequence[str],
    *more: str,
    shapes: Sequence[str] = MODEL_SHAPES,
    needs: tuple[str, ...] = _USABLE,
    variables: tuple[tuple[str, str], ...] = (),
    dtype: str = "float16",
) -> Step:
    command = (PYTHON, "-m", "benchmarks", "sweep", "--device", "cuda", "--dtypes", dtype, "--no-floors")
    command += ("--candidates", *candidates, "--shapes", *shapes, "--tokens", *map(str, tokens))
    command += ("--repetitions", "5", *more, "--json", f"{{work}}/{name}.json")
    return Step(name, group, command, seconds, needs, why, variables, f"{name}.json")


def _tests(
    name: str, group: str, seconds: int, why: str, *tests: str, chained: bool = True, beside: str = ""
) -> Step:
    variables = _ONE_THREAD + (() if chained else UNCHAINED)
    return Step(name, group, (*_PYTEST, *tests), seconds, _USABLE, why, variables, beside=beside)


def _sanitized(tool: str) -> Step:
    # Everything of a few dozen problems: under these tools a launch takes up to a hundred times as long.
    tests = [
        f"tests/cuda/test_cuda_linear.py::{name}"
        for name in (
            *("test_random_problems[0]", "test_layouts_of_words"),
            *("test_both_stages_in_one_kernel[[80, 72]-float16]", "test_unpacked"),
        )
    ]
    command = ("compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *_PYTEST, "-m", "", *tests)
    # Torch's allocator hands out parts of large blocks, past whose ends nothing is found.
    variables = (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),)
    why = f"does {tool} find something"
    return Step(tool, "check", command, 90, _USABLE, why, variables, tool="compute-sanitizer")


def _program(
    name: str,
    group: str,
    seconds: int,
    why: str,
    *arguments: str,
    source: str = "",
    needs: tuple[str, ...] = _USABLE,
) -> tuple[Step, Step]:
    """A measurement in CUDA C++, below torch: made, then run; its first argument is the file of results."""
    result = f"{name}.jsonl" if source or name == "variants" else f"{name}.json"
    make = Step(
        f"make-{name}",
        "setup",
        (*_MAKE, source or name, "--as", name, *_TO_MAKE),
        60,
        needs,
        beside="" if needs else "make",
    )
    command = (f"{{work}}/{name}", f"{{work}}/{result}", *arguments)
    return make, Step(name, group, command, seconds, (make.name,), why, result=result)


def _model(shape: str, seconds: int, *more: str) -> Step:
    command = (PYTHON, "-m", "benchmarks", "whole-model", "--device", "cuda", "--shape", shape)
    command += ("--rounds", "3", "--tokens", "64", *more, "--json", f"{{work}}/model-{shape}.json")
    why = "tokens per second, prefill and memory of a whole model"
    return Step(f"model-{shape}", "models", command, seconds, _USABLE, why, result=f"model-{shape}.json")


#: Counters of the two launches of one token. Sections are named, not sets: these are in every version.
_SECTIONS = ("SpeedOfLight", "LaunchStats", "Occupancy", "MemoryWorkloadAnalysis", "WarpStateStats")
_STALLS = ("long_scoreboard", "barrier", "no_instruction", "short_scoreboard", "membar")
_COUNTERS = (
    *("gpu__time_duration.sum", "smsp__inst_executed.sum", "dram__bytes_read.sum"),
    *(f"smsp__average_warps_issue_stalled_{stall}_per_issue_active.ratio" for stall in _STALLS),
)
_PROFILE = (
    *("ncu", "--clock-control", "none", "--csv", "--log-file", "{work}/profile.csv"),
    *("--kernel-name", "regex:decode", "--launch-skip", "4", "--launch-count", "2"),
    *(part for section in _SECTIONS for part in ("--section", section)),
    *("--metrics", ",".join(_COUNTERS), PYTHON, "-m", "benchmarks.cuda.suite.one_call"),
)

_MAKE_RATES, _RATES = _program(
    "mma_rates", "first", 10, "are 1-bit MMAs as fast as their bits promise", needs=()
)
_MAKE_BOUNDARY, _BOUNDARY = _program(
    "boundary", "first", 15, "what a launch costs in a graph, chained and not", needs=()
)

_SETUP = (
    Step(
        *("build", "setup", (*_MAKE, "library", *_TO_MAKE), 150, ()),
        "the library, carried along or compiled for this GPU",
        beside="make",
    ),
    _MAKE_RATES,
    _MAKE_BOUNDARY,
    Step(
        *("diagnostics", "setup", (PYTHON, "-m", "littlebit2_kernels.diagnostics", "--require-gpu"), 40),
        why="do the CUDA and Triton kernels give right results",
    ),
    Step(
        "gemlite-wheel",
        "setup",
        (
            *(PYTHON, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile", "--upgrade"),
            *("--target", "{work}/site", "--find-links", "{carry}/wheels", "gemlite"),
        ),
        15,
        (),
        wheel="wheels/gemlite-*.whl",
    ),
)

_FIRST = (
    # Nothing is timed while these share the GPU.
    _tests(
        *("first-calls", "first", 120, "may a first call be captured, by a process of its own"),
        *("-n", "4", _FIRST_CALLS),
        beside="tests",
    ),
    _tests(
        *("tests", "first", 130, "are results right, launches chained"),
        *(*_TOGETHER, f"--ignore={_FIRST_CALLS}", "tests/cuda"),
        beside="tests",
    ),
    _tests(
        *("tests-unchained", "first", 130, "are results right, launches one after another"),
        *(*_TOGETHER, f"--ignore={_FIRST_CALLS}", "tests/cuda"),
        chained=False,
        beside="tests",
    ),
    _RATES,
    _BOUNDARY,
    _measure(
        *("first-decode", "first", 50, "one token by mode, chained, beside FP16"),
        *([1], [*OURS, "dense"], "--bpw", "0.1"),
        shapes=FIRST_SHAPES,
    ),
    _measure(
        *("first-unchained", "first", 45, "the same, launches one after another"),
        *([1], [*OURS, "dense"], "--bpw", "0.1"),
        shapes=FIRST_SHAPES,
        variables=UNCHAINED,
    ),
    # GemLite tunes itself for every shape first.
    _measure(
        *("first-gemlite", "first", 60, "one token beside GemLite"),
        *([1], [OURS[0], "dense", "gemlite"], "--bpw", "0.1", "--modes", "cold"),
        shapes=FIRST_SHAPES,
        needs=("gemlite-wheel", *_USABLE),
    ),
    Step(
        *("profile", "first", _PROFILE, 40, _USABLE, "what the two launches of one token wait for"),
        result="profile.csv",
        tool="ncu",
        optional=True,
    ),
)

_DECODE = (
    # Which mode wins at one token, at every bits per weight, beside the peers.
    _measure(
        *("decode", "decode", 190, "which mode wins at one token, by bits per weight"),
        *([1], [*OURS, *PEERS], "--bpw", "0.1", "0.3", "0.55", "1.0", "--refcheck"),
    ),
    _measure(
        *("eager", "decode", 40, "what the host adds to a launch"),
        *([1], [OURS[0], "dense"], "--bpw", "0.1", "--no-graphs", "--modes", "hot"),
    ),
    _measure(
        *("batches", "decode", 130, "few tokens at once"),
        *([2, 4, 8, 16], [*OURS[:2], *PEERS], "--bpw", "0.1", "0.55"),
    ),
)

_VARIANTS = _program(
    *("variants", "variants", 240, "what the planner could have chosen better for few tokens"),
    *("--tokens", "1", "8"),
)

_CHECK = (
    # The slow tests too: on a GPU their sweeps take seconds.
    _tests(
        "all-tests",
        "check",
        190,
        "are results right in the exhaustive sweeps",
        *_TOGETHER,
        "-m",
        "",
        "tests/cuda",
    ),
    _sanitized("memcheck"),
    _sanitized("racecheck"),
)

_TRITON = (
    # Triton's kernels need no build of their own, but compile while they run.
    _tests(
        *("triton-tests", "triton", 200, "are results of the Triton kernels right"),
        *(*_TOGETHER, "tests/triton/kernels", "tests/triton/test_compiled.py"),
    ),
    _measure(
        *("triton-decode", "triton", 130, "few tokens by the Triton kernels"),
        *([1, 16], [OURS[0], *TRITON, *PEERS], "--bpw", "0.1", "--refcheck"),
    ),
    # Where one launch does a small layer faster than two (FUSED_SIGNS in triton/plan.py): the log has both.
    Step(
        "triton-fused",
        "triton",
        (
            *(*_TUNE, "--kernels", "decode", "--tokens", "1", "--shapes"),
            *("1024,1024", "2048,2048", "llama2-7b-qo", "llama3-8b-kv"),
        ),
        40,
        _USABLE,
        "where one launch beats two",
    ),
)

_PREFILL = (
    # The GEMM beside every other backend for prefill: whether `auto` chooses the fastest.
    _measure(
        *("prefill", "prefill", 230, "which backend is fastest for many tokens, and does `auto` take it"),
        [32, 128, 512, 2048, 8192],
        [OURS[1], TRITON[1], "littlebit2:blas:auto", *PEERS, "unpack", OURS[2], TRITON[2]],
        *("--bpw", "0.1", "1.0", "--modes", "hot"),
        shapes=PREFILL_SHAPES,
        dtype="bfloat16",
    ),
    # Few tokens of many users; from 17 on they take the GEMM too.
    _measure(
        *("prefill-small", "prefill", 60, "where the GEMM takes over from the decode kernels"),
        *([16, 17, 24, 48, 64], [*OURS[:2], *PEERS], "--bpw", "0.1"),
        shapes=PREFILL_SHAPES,
    ),
)

# Tiles, splits, one kernel for both stages, whose clusters must all give the bits of the GEMM.
_PREFILL_VARIANTS = _program(
    *("prefill-variants", "prefill-variants", 240),
    "what the planner could have chosen better for many tokens",
    *("--tokens", "64", "512", "2048", "--modes", "float16", "--repetitions", "3"),
    source="variants",
)

_MODELS = (
    _model("llama2-7b", 190, "--bpw", "0.1", "1.0", "--steps", "graph", "compile", "--prompt", "512"),
    _model("llama2-13b", 90, "--bpw", "0.1", "--prompt", "128"),
    _model("llama3-8b", 80, "--bpw", "0.1", "--prompt", "128"),
)

_GEMLITE = (
    _measure(
        *("gemlite", "gemlite", 170, "few tokens beside GemLite"),
        *([1, 8], [OURS[0], "dense", "gemlite"], "--bpw", "0.1", "1.0", "--modes", "cold"),
        needs=("gemlite-wheel", *_USABLE),
    ),
    _measure(
        *("prefill-gemlite", "gemlite", 100, "many tokens beside GemLite"),
        [32, 512, 2048],
        [OURS[1], "littlebit2:blas:auto", "dense", "gemlite"],
        *("--bpw", "0.1", "--modes", "hot"),
        shapes=PREFILL_SHAPES[-1:],
        needs=("gemlite-wheel", *_USABLE),
    ),
)

_PREFILL_TRITON = (
    # Triton's kernels at the sizes that have tuned configurations, and how much tuning gains.
    _measure(
        *("prefill-triton", "prefill-triton", 200, "many tokens by the Triton kernels"),
        *([32, 128, 512, 2048], [OURS[1], *TRITON[1:3], *PEERS], "--bpw", "0.1"),
    ),
    Step(
        "triton-tune",
        "prefill-triton",
        (*_TUNE, "--shapes", "llama2-7b-up", "--tokens", "1", "64"),
        170,
        _USABLE,
        "how much tuning gains",
    ),
)

STEPS = (
    *(*_SETUP, *_FIRST, *_DECODE, *_VARIANTS, *_CHECK, *_TRITON, *_PREFILL, *_PREFILL_VARIANTS),
    *(*_MODELS, *_GEMLITE, *_PREFILL_TRITON),
)
#: By priority.
GROUPS = tuple(dict.fromkeys(step.group for step in STEPS if step.group != "setup"))
