"""One page on what a call of the suite found."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.cuda.suite.steps import Result
from benchmarks.markdown import markdown

__all__ = ["MOST_LINES", "summary"]

#: What is one page.
MOST_LINES = 70

#: What plans assume of a launch (docs/cuda.md), in microseconds.
_ASSUMED = {"one after another": 1.0, "chained, waits first": 0.3}
_CHAINED = ("first-decode", "decode")
_UNCHAINED = "first-unchained"


def summary(name: str, results: Sequence[Result], about: Mapping[str, Any], *, rehearsal: bool) -> str:
    """The page, in Markdown.

    Args:
        name: of the call.
        results: of its steps.
        about: see :func:`benchmarks.records.host_environment`.
        rehearsal: whether stand-ins ran in place of the commands.
    """
    by_name = {result.name: result for result in results}
    commit = (about.get("git") or {}).get("commit") or "unknown"
    head = f"# gpu-suite {name}\n\n{about.get('device')}, commit {commit[:12]}, {about.get('date')}"
    if rehearsal:
        head += "\n\n**A rehearsal: stand-ins ran, and no number on this page was measured.**"
    parts = [
        head,
        _steps(results),
        _rates(by_name),
        _boundaries(by_name),
        _decode(by_name),
        _counters(by_name),
    ]
    lines = "\n\n".join(filter(None, parts)).splitlines()
    if len(lines) > MOST_LINES:
        lines = [*lines[: MOST_LINES - 1], "(cut off: the JSON file has everything)"]
    return "\n".join(lines) + "\n"


def _outcome(result: Result) -> str:
    """How many tests passed, where there were tests; else the last line of what went wrong."""
    counts = re.findall(r"^=*\s*(\d+ \w+(?:, \d+ \w+)*)(?: in [\d.]+s.*)?$", result.tail, re.MULTILINE)
    if counts:
        return str(counts[-1])
    last = result.tail.strip().splitlines()[-1:] if result.bad else []
    return "".join(last)[:70]


def _steps(results: Sequence[Result]) -> str:
    rows = [
        [
            result.name,
            f"{result.seconds:.0f}" + (" (before)" if result.reused else ""),
            result.state[:60],
            _outcome(result),
        ]
        for result in results
    ]
    return markdown(["step", "s", "state", "outcome"], rows)


def _of(by_name: Mapping[str, Result], name: str, kind: type) -> Any:
    measured = by_name[name].measured if name in by_name else None
    return measured if isinstance(measured, kind) else None


def _rates(by_name: Mapping[str, Result]) -> str:
    rates = (_of(by_name, "mma_rates", dict) or {}).get("rates", [])
    cells = [
        f"{rate['mma']} {rate['per_sm_per_second'] / rate['clock_hz']:.3f}"
        for rate in rates
        if rate["clock_hz"]
    ]
    return "MMAs per SM and clock: " + "; ".join(cells) + "." if cells else ""


def _boundaries(by_name: Mapping[str, Result]) -> str:
    found = (_of(by_name, "boundary", dict) or {}).get("boundaries", [])
    if not found:
        return ""
    launches = list(dict.fromkeys(entry["launch"] for entry in found))
    blocks = list(dict.fromkeys(entry["blocks"] for entry in found))
    times = {(entry["launch"], entry["blocks"]): entry["us"] for entry in found}
    rows = [
        [
            launch,
            *(f"{times[launch, count]:.2f}" if (launch, count) in times else "" for count in blocks),
            str(_ASSUMED.get(launch, "")),
        ]
        for launch in launches
    ]
    head = ["us of an empty launch in a graph", *(f"{count} blocks" for count in blocks), "assumed"]
    return markdown(head, rows)


def _rows_of(by_name: Mapping[str, Result], name: str) -> list[dict[str, Any]]:
    return list((_of(by_name, name, dict) or {}).get("rows", []))


def _problem(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["shape"], row["bpw"], row["tokens"], row["mode"]


def _decode(by_name: Mapping[str, Result]) -> str:
    """Times of one token by mode, chained and not, and how many times as fast as dense that is."""
    name = next((name for name in _CHAINED if _rows_of(by_name, name)), "")
    unchained = {(*_problem(row), row["candidate"]): row["median"] for row in _rows_of(by_name, _UNCHAINED)}
    gemlite = {
        _problem(row): row["median"]
        for row in _rows_of(by_name, "first-gemlite")
        if row["candidate"] == "gemlite"
    }
    rows = []
    for row in _rows_of(by_name, name) if name else []:
        without = unchained.get((*_problem(row), row["candidate"]))
        peer = gemlite.get(_problem(row))
        ratio = row["speedups"].get("dense")
        rows.append(
            [
                *(str(row["shape"]), f"{row['bpw']:g}", str(row["mode"])),
                str(row["candidate"]).removeprefix("littlebit2:cuda:"),
                f"{row['median'] * 1e6:.2f}",
                "" if without is None else f"{without * 1e6:.2f}",
                "" if ratio is None else f"{ratio[0]:.1f}x",
                "" if peer is None or not row["ours"] else f"{peer / row['median']:.1f}x",
            ]
        )
    head = ["shape", "bpw", "weights", "mode", "us chained", "us unchained", "over dense", "over gemlite"]
    return markdown(head, rows) if rows else ""


#: Columns of Nsight Compute's table that are of interest, by their names there.
_COUNTERS = {
    "gpu__time_duration.sum": "time",
    "Duration": "time",
    "Elapsed Cycles": "cycles",
    "smsp__inst_executed.sum": "instructions",
    "dram__bytes_read.sum": "read",
    "Registers Per Thread": "registers",
    "Achieved Occupancy": "occupancy",
    "L2 Hit Rate": "L2 hits",
    "Warp Cycles Per Issued Instruction": "cycles per issue",
    **{
        f"smsp__average_warps_issue_stalled_{stall}_per_issue_active.ratio": f"stalled: {stall}"
        for stall in ("long_scoreboard", "barrier", "no_instruction")
    },
}


def _counters(by_name: Mapping[str, Result]) -> str:
    text = _of(by_name, "profile", str) or ""
    # The table comes after lines of the profiler's own.
    start = text.find('"ID",')
    if start < 0:
        return ""
    launches: dict[str, dict[str, str]] = {}
    for row in csv.DictReader(io.StringIO(text[start:])):
        label = _COUNTERS.get(row.get("Metric Name") or "")
        if label:
            unit = row.get("Metric Unit") or ""
            launch = launches.setdefault(f"{row['ID']}: grid {row.get('Grid Size', '')}", {})
            launch.setdefault(label, f"{row.get('Metric Value', '')} {unit}".strip())
    labels = [
        label for label in dict.fromkeys(_COUNTERS.values()) if any(label in v for v in launches.values())
    ]
    rows = [[label, *(values.get(label, "") for values in launches.values())] for label in labels]
    return markdown(["counter", *launches], rows) if rows else ""
