"""Build the models of `whole-model` and time them against each other.

Rounds are interleaved as everywhere: every model decodes once per round, in rotating order, and ratios
are formed within a round. A dense model that is not measured whole is measured at two numbers of layers,
and the time of a step is taken as linear in their number; rows say so.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.models.decode import (
    Decode,
    DecodeTimer,
    GenerateDecode,
    Profile,
    StaticDecode,
    profile_decode,
)
from benchmarks.models.llama import build_dense, build_packed, twin, weight_bytes
from benchmarks.models.llama_options import DEFAULT, apply_options, parse_options
from benchmarks.models.model_rows import Memory, ModelRow, add_speedups, extrapolated_row
from benchmarks.options import note
from benchmarks.problems import dtype_name, parse_dtype
from benchmarks.shapes import LLAMA_SHAPES, LlamaShape, parse_llama_shape
from benchmarks.timing import Timing, spread_of, time_interleaved
from littlebit2 import fuse_projections

__all__ = ["Report", "Session"]

GENERATE = "generate"


@dataclass
class Report:
    """Everything that one run measured.

    Attributes:
        rows: models.
        profiles: by name of a row, where the time of its steps goes.
        unavailable: models that could not be measured, with the reason.
        memory_before: bytes resident, or allocated on the GPU, before any model.
    """

    rows: list[ModelRow] = field(default_factory=list)
    profiles: dict[str, Profile] = field(default_factory=dict)
    unavailable: dict[str, str] = field(default_factory=dict)
    memory_before: int | None = None


@dataclass
class _Candidate:
    """A model to be timed; ``part_of`` names the extrapolated row that it serves, if it has none itself."""

    name: str
    decode: Decode
    linears: str
    bpw: float | None
    fused: bool
    option: str
    step: str
    memory: Memory | None = None
    part_of: str | None = None

    @property
    def layers(self) -> int:
        return self.decode.model.config.num_hidden_layers


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
    """Memory of this process, or allocations on a GPU, from now on."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.before = self._now()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._peaks = True
        else:
            self._peaks = _reset_peak()

    def _now(self) -> int | None:
        if self._device.type == "cuda":
            return torch.cuda.memory_allocated(self._device)
        return _status_bytes("VmRSS")

    def read(self) -> Memory | None:
        after = self._now()
        if self.before is None or after is None:
            return None
        if self._device.type == "cuda":
            return Memory(self.before, after, torch.cuda.max_memory_allocated(self._device))
        return Memory(self.before, after, _status_bytes("VmHWM") if self._peaks else None)


# --- measuring -----------------------------------------------------------------------------------------


class Session:
    """The models of one run; models that differ in options, steps or layers only share their weights.

    Args:
        options: what `whole-model` parsed.
        device: where the models are.

    Raises:
        ValueError: an option cannot be measured.
    """

    def __init__(self, options: Namespace, device: torch.device) -> None:
        gpu = device.type == "cuda"
        self.device = device
        self.shape: LlamaShape = parse_llama_shape(options.shape)
        self.layers: int = options.layers or self.shape.layers
        self.dtype = parse_dtype(options.dtype or ("float16" if gpu else "bfloat16"))
        self.steps: list[str] = list(dict.fromkeys(options.steps or ["graph" if gpu else GENERATE]))
        wanted = [dtype_name(self.dtype)] if options.dense is None else options.dense
        self._dense_dtypes = [parse_dtype(text) for text in dict.fromkeys(wanted)]
        self._projections = list(dict.fromkeys(options.projections or ["fused" if gpu else "apart"]))
        most = min(options.dense_layers or (self.layers if gpu else 4), self.layers)
        self._dense_counts = [self.layers] if most == self.layers else [most // 2, most]
        limit = options.memory_gib or (torch.cuda.mem_get_info(device)[1] / 2**30 if gpu else 12)
        self.options = options
        self._check(limit)
        generator = torch.Generator().manual_seed(0)
        size = (options.rows, options.prompt)
        self._prompt = torch.randint(self.shape.vocabulary, size, generator=generator).to(device)
        self._unavailable: dict[str, str] = {}

    def _check(self, memory_gib: float) -> None:
        """Refuse what cannot be measured before anything is built."""
        options = self.options
        for text in (*options.options, *options.dense_options):
            if not parse_options(text):
                raise ValueError(f"options must name changes, {DEFAULT!r} is always measured")
        if options.tokens < 2:
            raise ValueError(f"tokens must be at least 2, the first ends the prefill, got {options.tokens}")
        if options.rows > 1 and GENERATE in self.steps:
            raise ValueError(f"rows must be 1 with the step {GENERATE!r}, got {options.rows}")
        if self._dense_counts[0] < 1:
            raise ValueError(
                f"dense-layers must be at least 2 to extrapolate to {self.layers} layers, "
                f"got {options.dense_layers}"
            )
        # Linear layers take most of the memory.
        macs = self.shape.linear_macs(self._dense_counts[-1])
        needed = sum(macs * dtype.itemsize for dtype in self._dense_dtypes)
        for bpw in options.bpw:
            needed += int(self.shape.linear_macs(self.layers) * bpw / 8 * 1.1) * len(self._projections)
        if needed > memory_gib * 2**30:
            raise ValueError(
                f"linear layers of all models must fit into {memory_gib:g} GiB, they need "
                f"{needed / 2**30:.1f}: see --memory-gib, --dense-layers and --dense"
            )

    def measure(self) -> Report:
        """Build, time and profile everything.

        Raises:
            ValueError: there is nothing to measure.
        """
        self._warm_up()
        report = Report(memory_before=_MemoryWatch(self.device).before, unavailable=self._unavailable)
        candidates = list(self._candidates())
        for name, reason in self._unavailable.items():
            note(f"not measured: {name}: {reason}")
        if not candidates:
            if self._unavailable:
                return report
            raise ValueError("bpw and dense must name one model at least, got none")
        note(f"timing {len(candidates)} models")
        timings = time_interleaved(
            {candidate.name: candidate.decode for candidate in candidates},
            repetitions=self.options.rounds,
            timer=DecodeTimer(),
        )
        report.rows = _rows(candidates, timings, self.layers)
        if self.options.profile:
            for candidate in candidates:
                if candidate.layers == self.layers and isinstance(candidate.decode, GenerateDecode):
                    rounds = min(self.options.rounds, 3)
                    report.profiles[candidate.name] = profile_decode(candidate.decode, rounds)
        return report

    def _warm_up(self) -> None:
        """Decode with a small model, so that what loads on first use does not count as a model's memory."""
        tiny = LLAMA_SHAPES["tiny"]
        model = build_packed(tiny, 1, 1.0, self.dtype, device=self.device)
        GenerateDecode(model, self._prompt[:1] % tiny.vocabulary, self.options.tokens)()

    def _candidates(self) -> Iterator[_Candidate]:
        for bpw in self.options.bpw:
            for projections in self._projections:
                name = f"packed {bpw:g} bpw"
                name += f", {projections}" if len(self._projections) > 1 else ""
                fused = projections == "fused"
                note(f"building {name}")

                def build(bpw: float = bpw, fused: bool = fused) -> Any:
                    model = build_packed(
                        self.shape, self.layers, bpw, self.dtype, paths=self.options.paths, device=self.device
                    )
                    if fused:
                        fuse_projections(model, on_cpu=True)
                    return model

                watch = _MemoryWatch(self.device)
                yield from self._of_model(name, build(), "packed", bpw, fused, self.options.options, watch)
        for dtype in self._dense_dtypes:
            yield from self._dense(dtype)

    def _dense(self, dtype: torch.dtype) -> Iterator[_Candidate]:
        name = f"dense {dtype_name(dtype)}"
        counts, texts = self._dense_counts, self.options.dense_options
        note(f"building {name}, {counts[-1]} layers")
        watch = _MemoryWatch(self.device)
        model = build_dense(self.shape, counts[-1], dtype, device=self.device)
        if len(counts) == 1:
            yield from self._of_model(name, model, "dense", None, False, texts, watch)
            return
        for count in counts:
            part = model if count == counts[-1] else twin(model, self.shape, layers=count)
            label = f"{name}, {count} layers"
            for candidate in self._of_model(label, part, "dense", None, False, texts, None):
                candidate.part_of = name + candidate.name.removeprefix(label)
                yield candidate

    def _of_model(
        self,
        name: str,
        model: Any,
        linears: str,
        bpw: float | None,
        fused: bool,
        texts: Sequence[str],
        watch: _MemoryWatch | None,
    ) -> Iterator[_Candidate]:
        """The model with every kind of step, then with its options; ``watch`` began before it was built."""
        for text in dict.fromkeys([DEFAULT, *texts]):
            for step in self.steps:
                full = name + ("" if text == DEFAULT else f", {text}")
                full += "" if step == GENERATE else f", {step}"
                try:
                    changed = model if text == DEFAULT else apply_options(model, self.shape, text)
                    decode = self._decode(changed, step)
                    decode()
                except Exception as error:
                    # Whatever stops one of them, a missing compiler for instance, the others can be measured.
                    reason = next(iter(str(error).splitlines()), "")
                    self._unavailable[full] = f"{type(error).__name__}: {reason}"
                    continue
                memory = None if watch is None else watch.read()
                watch = None
                yield _Candidate(full, decode, linears, bpw, fused, text, step, memory)

    def _decode(self, model: Any, step: str) -> Decode:
        if step == GENERATE:
            return GenerateDecode(model, self._prompt, self.options.tokens)
        return StaticDecode(model, self._prompt, self.options.tokens, step)


def _row(candidate: _Candidate, timing: Timing) -> ModelRow:
    decode = candidate.decode
    spread = spread_of(decode.steps)
    return ModelRow(
        name=candidate.name,
        linears=candidate.linears,
        bpw=candidate.bpw,
        fused=candidate.fused,
        dtype=dtype_name(decode.model.dtype),
        option=candidate.option,
        step=candidate.step,
        layers=candidate.layers,
        measured_layers=[candidate.layers],
        samples=list(timing.samples),
        median=timing.median,
        low=spread.low,
        high=spread.high,
        fastest=min(decode.steps),
        prefill=spread_of([generation.prefill for generation in decode.generations]).median,
        weight_bytes=weight_bytes(decode.model),
        memory=candidate.memory,
    )


def _rows(candidates: Sequence[_Candidate], timings: Mapping[str, Timing], layers: int) -> list[ModelRow]:
    measured = [(candidate, _row(candidate, timings[candidate.name])) for candidate in candidates]
    rows = [row for _, row in measured]
    for name in dict.fromkeys(c.part_of for c, _ in measured if c.part_of):
        parts = [row for candidate, row in measured if candidate.part_of == name]
        # An option can fail at one number of layers.
        if len(parts) == 2:
            rows.append(extrapolated_row(name, parts[0], parts[1], layers))
    add_speedups([row for row in rows if row.layers == layers], DEFAULT)
    return rows
