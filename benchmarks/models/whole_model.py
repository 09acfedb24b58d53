"""Decode of a whole model of random weights through ``generate``, packed beside dense, with a profile.

Rounds are interleaved as everywhere in the harness: every model decodes once per round, in rotating order,
and ratios are formed within a round. A dense model that does not fit is measured at two numbers of layers,
and the time of a step taken as linear in their number; rows say so.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks import PROCESSORS
from benchmarks.layers.candidates import dtype_name
from benchmarks.markdown import markdown
from benchmarks.models.decode import PARTS, Decode, DecodeTimer, Profile, profile_decode
from benchmarks.models.llama import (
    LLAMA_SHAPES,
    LlamaShape,
    build_dense,
    build_packed,
    linear_macs,
    parse_llama_shape,
    require_transformers,
    twin,
    weight_bytes,
)
from benchmarks.models.llama_options import DEFAULT, OPTIONS, apply_options, parse_options
from benchmarks.problems import parse_dtype
from benchmarks.records import Document, environment, write_text
from benchmarks.tables import describe_environment
from benchmarks.timing import Timing, spread_of, time_interleaved

__all__ = ["Memory", "ModelRow", "Report", "extrapolate", "run"]

SCHEMA = 1


@dataclass(frozen=True)
class Memory:
    """Resident memory of this process, in bytes.

    Attributes:
        before: ahead of the model.
        after: with the model, after it decoded.
        peak: the most in between, or ``None`` where the system does not let it be measured.
    """

    before: int
    after: int
    peak: int | None

    @property
    def growth(self) -> int:
        """What the model added."""
        return self.after - self.before


@dataclass(frozen=True)
class ModelRow:
    """One model, timed together with all others of the run.

    Attributes:
        name: what tells it from the others.
        linears: ``packed`` or ``dense``.
        bpw: counted bits per weight of the packed layers; ``None`` if dense.
        dtype: of activations and dense weights.
        option: see :data:`benchmarks.models.llama_options.OPTIONS`.
        layers: decoder layers.
        measured_layers: those of the models that were measured; two numbers if the row is extrapolated.
        samples: median seconds of a step in each round.
        median: seconds of a step, median of ``samples``.
        low: lower quartile of all steps of all rounds; of ``samples`` if the row is extrapolated.
        high: their upper quartile.
        fastest: shortest of all steps of all rounds: the least disturbed one.
        prefill: median seconds up to the first token, or ``None`` if the row is extrapolated.
        weight_bytes: of the model as described; bytes of all its weights.
        memory: resident memory, of models without options that were measured whole.
        fixed_seconds: extrapolated rows: of a step, outside of the layers.
        layer_seconds: extrapolated rows: of each layer.
        speedups: by name of another row, median and quartiles of the ratios within rounds.
    """

    name: str
    linears: str
    bpw: float | None
    dtype: str
    option: str
    layers: int
    measured_layers: list[int]
    samples: list[float]
    median: float
    low: float
    high: float
    fastest: float
    prefill: float | None
    weight_bytes: int
    memory: Memory | None = None
    fixed_seconds: float | None = None
    layer_seconds: float | None = None
    speedups: dict[str, list[float]] = field(default_factory=dict)

    @property
    def tokens_per_second(self) -> float:
        """Of decode, without the prompt."""
        return 1 / self.median


@dataclass
class Report:
    """Everything that one run measured; written as JSON.

    Attributes:
        environment: see :func:`benchmarks.records.environment`.
        settings: what was asked for.
        rows: models.
        profiles: by name of a row, where the time of its steps goes.
        unavailable: models that could not be measured, with the reason.
    """

    environment: dict[str, Any]
    settings: dict[str, Any]
    rows: list[ModelRow] = field(default_factory=list)
    profiles: dict[str, Profile] = field(default_factory=dict)
    unavailable: dict[str, str] = field(default_factory=dict)


@dataclass
class _Candidate:
    """A model to be timed; ``part_of`` names the extrapolated row that it serves, if it has none itself."""

    name: str
    decode: Decode
    linears: str
    bpw: float | None
    option: str = DEFAULT
    memory: Memory | None = None
    part_of: str | None = None

    @property
    def layers(self) -> int:
        return self.decode.model.config.num_hidden_layers


def extrapolate(
    first: float, second: float, counts: tuple[int, int], layers: int
) -> tuple[float, float, float]:
    """Seconds of a step with ``layers`` layers, if they are linear in the number of layers.

    Args:
        first: seconds of a step with ``counts[0]`` layers.
        second: seconds of a step with ``counts[1]`` layers.
        counts: two numbers of layers, the smaller one first.
        layers: number of layers wanted.

    Returns:
        Seconds of the step, of what does not depend on the number of layers, and of each layer.

    Raises:
        ValueError: ``counts`` are not two increasing positive numbers.
    """
    if not 0 < counts[0] < counts[1]:
        raise ValueError(f"counts must be two increasing positive numbers of layers, got {counts}")
    layer = (second - first) / (counts[1] - counts[0])
    fixed = first - counts[0] * layer
    return fixed + layers * layer, fixed, layer


# --- memory --------------------------------------------------------------------------------------------


def _status_bytes(key: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    except OSError:
        return None
    for line in lines:
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0]) * 1024
    return None


def _reset_peak() -> bool:
    try:
        # Linux: 5 sets the peak of the resident memory to what is resident now.
        Path("/proc/self/clear_refs").write_text("5", "utf-8")
    except OSError:
        return False
    return True


class _MemoryWatch:
    def __init__(self) -> None:
        self._before = _status_bytes("VmRSS")
        self._peaks = _reset_peak()

    def read(self) -> Memory | None:
        after = _status_bytes("VmRSS")
        if self._before is None or after is None:
            return None
        return Memory(self._before, after, _status_bytes("VmHWM") if self._peaks else None)


# --- measuring -----------------------------------------------------------------------------------------


class _Session:
    """The models of one run; those of one kind share their weights."""

    def __init__(self, options: Namespace) -> None:
        self.shape: LlamaShape = parse_llama_shape(options.shape)
        self.layers: int = options.layers or self.shape.layers
        self.dtype = parse_dtype(options.dtype)
        self.options = options
        generator = torch.Generator().manual_seed(0)
        self._prompt = torch.randint(self.shape.vocabulary, (1, options.prompt), generator=generator)
        self.unavailable: dict[str, str] = {}

    def check(self) -> None:
        """Refuse what cannot be measured before anything is built."""
        for text in (*self.options.options, *self.options.dense_options):
            if not parse_options(text):
                raise ValueError(f"options must name changes, {DEFAULT!r} is always measured")
        if self.options.tokens < 2:
            raise ValueError(
                f"tokens must be at least 2, the first is the prefill's, got {self.options.tokens}"
            )
        if self._dense_counts()[0] < 1:
            raise ValueError(
                f"dense-layers must be at least 2 to extrapolate to {self.layers} layers, "
                f"got {self.options.dense_layers}"
            )
        limit = int(self.options.memory_gib * 2**30)
        needed = 0
        for dtype in self._dense_dtypes():
            # What the linear layers take is most of it.
            needed += linear_macs(self.shape, self._dense_counts()[-1]) * dtype.itemsize
        for bpw in self.options.bpw:
            needed += int(linear_macs(self.shape, self.layers) * bpw / 8 * 1.1)
        if needed > limit:
            raise ValueError(
                f"linear layers of all models must fit into {self.options.memory_gib:g} GiB, they need "
                f"{needed / 2**30:.1f}: see --memory-gib, --dense-layers and --dense"
            )

    def _dense_dtypes(self) -> list[torch.dtype]:
        return [parse_dtype(text) for text in dict.fromkeys(self.options.dense)]

    def _dense_counts(self) -> list[int]:
        most = min(self.options.dense_layers, self.layers)
        return [self.layers] if most == self.layers else [most // 2, most]

    def _decode(self, model: Any, extra: Mapping[str, Any] | None = None) -> Decode:
        return Decode(model, self._prompt, self.options.tokens, extra or {})

    def warm_up(self) -> None:
        """Decode with a small model, so that what loads on first use does not pass for memory of a model."""
        tiny = LLAMA_SHAPES["tiny"]
        model = build_packed(tiny, 1, 1.0, self.dtype)
        Decode(model, self._prompt % tiny.vocabulary, self.options.tokens)()

    def _watched(self, build: Any) -> tuple[Decode, Memory | None]:
        watch = _MemoryWatch()
        decode = self._decode(build())
        decode()
        return decode, watch.read()

    def candidates(self) -> Iterator[_Candidate]:
        """Build every model; packed ones with their options first."""
        for bpw in self.options.bpw:
            name = f"packed {bpw:g} bpw"
            _progress(f"building {name}")
            base, memory = self._watched(
                lambda bpw=bpw: build_packed(
                    self.shape, self.layers, bpw, self.dtype, paths=self.options.paths
                )
            )
            yield _Candidate(name, base, "packed", bpw, DEFAULT, memory)
            for text, decode in self._with_options(name, base.model, self.options.options):
                yield _Candidate(f"{name}, {text}", decode, "packed", bpw, text)
        for dtype in self._dense_dtypes():
            yield from self._dense(dtype)

    def _with_options(self, name: str, model: Any, texts: Sequence[str]) -> Iterator[tuple[str, Decode]]:
        for text in dict.fromkeys(texts):
            _progress(f"building {name}, {text}")
            try:
                decode = self._decode(*apply_options(model, self.shape, text))
                decode()
            except Exception as error:
                # Whatever stops an option, a missing compiler for instance, the others can be measured.
                reason = next(iter(str(error).splitlines()), "")
                self.unavailable[f"{name}, {text}"] = f"{type(error).__name__}: {reason}"
                continue
            yield text, decode

    def _dense(self, dtype: torch.dtype) -> Iterator[_Candidate]:
        name = f"dense {dtype_name(dtype)}"
        counts = self._dense_counts()
        _progress(f"building {name}, {counts[-1]} layers")
        decode, memory = self._watched(lambda: build_dense(self.shape, counts[-1], dtype))
        if len(counts) == 1:
            yield _Candidate(name, decode, "dense", None, DEFAULT, memory)
            for text, changed in self._with_options(name, decode.model, self.options.dense_options):
                yield _Candidate(f"{name}, {text}", changed, "dense", None, text)
            return
        for count in counts:
            model = decode.model if count == counts[-1] else twin(decode.model, self.shape, layers=count)
            part = f"{name}, {count} layers"
            yield _Candidate(part, self._decode(model), "dense", None, part_of=name)
            for text, changed in self._with_options(part, model, self.options.dense_options):
                yield _Candidate(f"{part}, {text}", changed, "dense", None, text, part_of=f"{name}, {text}")


def _progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _row(candidate: _Candidate, timing: Timing) -> ModelRow:
    decode = candidate.decode
    spread = spread_of(decode.steps)
    prefill = spread_of([generation.prefill for generation in decode.generations])
    return ModelRow(
        name=candidate.name,
        linears=candidate.linears,
        bpw=candidate.bpw,
        dtype=dtype_name(decode.model.dtype),
        option=candidate.option,
        layers=candidate.layers,
        measured_layers=[candidate.layers],
        samples=list(timing.samples),
        median=timing.median,
        low=spread.low,
        high=spread.high,
        fastest=min(decode.steps),
        prefill=prefill.median,
        weight_bytes=weight_bytes(decode.model),
        memory=candidate.memory,
    )


def _extrapolated(name: str, few: ModelRow, many: ModelRow, layers: int) -> ModelRow:
    counts = (few.layers, many.layers)
    fits = [extrapolate(a, b, counts, layers) for a, b in zip(few.samples, many.samples, strict=True)]
    spread = spread_of([step for step, _, _ in fits])
    size, _, _ = extrapolate(few.weight_bytes, many.weight_bytes, counts, layers)
    return dataclasses.replace(
        many,
        name=name,
        layers=layers,
        measured_layers=list(counts),
        samples=[step for step, _, _ in fits],
        median=spread.median,
        low=spread.low,
        high=spread.high,
        fastest=extrapolate(few.fastest, many.fastest, counts, layers)[0],
        prefill=None,
        weight_bytes=round(size),
        fixed_seconds=spread_of([fixed for _, fixed, _ in fits]).median,
        layer_seconds=spread_of([layer for _, _, layer in fits]).median,
    )


def _rows(candidates: Sequence[_Candidate], timings: Mapping[str, Timing], layers: int) -> list[ModelRow]:
    measured = [(candidate, _row(candidate, timings[candidate.name])) for candidate in candidates]
    rows = [row for _, row in measured]
    for name in dict.fromkeys(c.part_of for c, _ in measured if c.part_of):
        parts = [row for candidate, row in measured if candidate.part_of == name]
        # An option can fail at one number of layers.
        if len(parts) == 2:
            rows.append(_extrapolated(name, parts[0], parts[1], layers))
    whole = [row for row in rows if row.layers == layers]
    for row in whole:
        if row.linears == "dense":
            continue
        for peer in whole:
            same = peer.option == DEFAULT and row.option != DEFAULT and peer.bpw == row.bpw
            if same or peer.linears == "dense":
                spread = Timing(tuple(row.samples)).speedup_spread(Timing(tuple(peer.samples)))
                row.speedups[peer.name] = [spread.median, spread.low, spread.high]
    return rows


def run(options: Namespace) -> int:
    """Measure what the options ask for; returns the exit status."""
    require_transformers()
    if options.threads > len(PROCESSORS):
        raise ValueError(
            f"threads must be at most the {len(PROCESSORS)} processors of this process, got {options.threads}"
        )
    session = _Session(options)
    session.check()
    before = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        report = _measure(session)
    finally:
        torch.set_num_threads(before)
    print(describe_environment(Document(report.environment)))
    print(f"\n{describe_settings(report)}\n\n{models_table(report.rows)}")
    if report.profiles:
        print(f"\n{profile_table(report)}")
    if options.json is not None:
        content = {"schema": SCHEMA, "benchmark": "whole-model", **dataclasses.asdict(report)}
        text = json.dumps(content, indent=1) + "\n"
        print(f"\nwrote {write_text(options.json, text)}", file=sys.stderr)
    return 0


def _measure(session: _Session) -> Report:
    options = session.options
    report = Report(
        environment(torch.device("cpu"), [options.threads]),
        {
            "shape": session.shape.name,
            "layers": session.layers,
            "dtype": dtype_name(session.dtype),
            "paths": options.paths,
            "prompt": options.prompt,
            "tokens": options.tokens,
            "rounds": options.rounds,
            "threads": options.threads,
        },
        unavailable=session.unavailable,
    )
    session.warm_up()
    before = _status_bytes("VmRSS")
    report.settings["resident_before"] = before
    candidates = list(session.candidates())
    for name, reason in session.unavailable.items():
        _progress(f"not measured: {name}: {reason}")
    if not candidates:
        raise ValueError("bpw and dense must name one model at least, got none")
    _progress(f"timing {len(candidates)} models")
    timings = time_interleaved(
        {candidate.name: candidate.decode for candidate in candidates},
        repetitions=options.rounds,
        timer=DecodeTimer(),
    )
    report.rows = _rows(candidates, timings, session.layers)
    if options.profile:
        for candidate in candidates:
            compiled = any(OPTIONS[name].compiled for name in parse_options(candidate.option))
            if candidate.layers == session.layers and not compiled:
                report.profiles[candidate.name] = profile_decode(candidate.decode, min(options.rounds, 3))
    return report


# --- tables --------------------------------------------------------------------------------------------


def describe_settings(report: Report) -> str:
    """What was asked for, as a line."""
    s = report.settings
    return (
        f"{s['shape']}, {s['layers']} layers, random weights, activations {s['dtype']}, batch 1, "
        f"{s['threads']} threads; prompt of {s['prompt']} tokens, {s['tokens']} new ones, "
        f"{s['rounds']} rounds; resident before any model {_mib(s['resident_before'] or 0)} MiB"
    )


def models_table(rows: Sequence[ModelRow]) -> str:
    """Every model: step, tokens per second, prefill, weights, memory, and ratios within rounds."""
    peers = list(dict.fromkeys(name for row in rows for name in row.speedups if name.startswith("dense")))
    extrapolated = {row.name for row in rows if len(row.measured_layers) > 1}
    against = [f"vs {peer}" + (" (extrapolated)" if peer in extrapolated else "") for peer in peers]
    head = ["model", "layers", "ms/token (quartiles)", "fastest", "tok/s", "first token ms", "weights MiB"]
    head += ["resident MiB (peak)", *against, "vs as is"]
    return markdown(head, [_cells(row, peers) for row in rows])


def _cells(row: ModelRow, peers: Sequence[str]) -> list[str]:
    own = next((ratio for name, ratio in row.speedups.items() if name not in peers), None)
    layers = str(row.layers)
    if len(row.measured_layers) > 1:
        layers += f", extrapolated from {' and '.join(map(str, row.measured_layers))} layers"
    memory = ""
    if row.memory is not None:
        peak = row.memory.peak
        memory = f"{_mib(row.memory.growth)}" + (
            "" if peak is None else f" ({_mib(peak - row.memory.before)})"
        )
    return [
        row.name,
        layers,
        f"{row.median * 1e3:.2f} ({row.low * 1e3:.2f}-{row.high * 1e3:.2f})",
        f"{row.fastest * 1e3:.2f}",
        f"{row.tokens_per_second:.2f}",
        "" if row.prefill is None else f"{row.prefill * 1e3:.0f}",
        _mib(row.weight_bytes),
        memory,
        *(_ratio(row.speedups.get(peer)) for peer in peers),
        _ratio(own),
    ]


def _mib(size: int) -> str:
    return f"{size / 2**20:.0f}"


def _ratio(values: Sequence[float] | None) -> str:
    return "" if values is None else f"{values[0]:.3g}x ({values[1]:.3g}-{values[2]:.3g})"


def profile_table(report: Report) -> str:
    """Parts of a step by model, and below their sum a step without the clocks of the profile."""
    profiles = report.profiles
    first = next(iter(profiles.values()))
    lines = [
        [part, *(f"{p.parts[part] * 1e3:.2f} ({p.shares[part]:.1%})" for p in profiles.values())]
        for part in sorted(PARTS, key=lambda part: -first.parts[part])
    ]
    lines.append(["step, sum of the above", *(f"{p.step * 1e3:.2f}" for p in profiles.values())])
    lines.append(["step without the clocks", *(f"{p.plain * 1e3:.2f}" for p in profiles.values())])
    return markdown(["ms of a step", *profiles], lines)
