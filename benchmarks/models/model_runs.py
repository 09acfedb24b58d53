"""Build the models of `whole-model` and time them against each other.

Rounds are interleaved as everywhere: every model decodes once per round, in rotating order, and ratios
are formed within a round. A dense model that is not measured whole is measured at two numbers of layers,
and the time of a step is taken as linear in their number; rows say so. The same is done with llama.cpp,
whose binary takes its turn when the others are done.
"""

from __future__ import annotations

import tempfile
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.models import llama_cpp
from benchmarks.models.decode import (
    Decode,
    DecodeTimer,
    GenerateDecode,
    LoadedDecode,
    Profile,
    StaticDecode,
    profile_decode,
)
from benchmarks.models.llama import build_dense, build_packed, load_random, twin, weight_bytes
from benchmarks.models.memory import Memory, MemoryWatch
from benchmarks.models.model_rows import LOADED, PLAIN, ModelRow, add_speedups, extrapolated_row
from benchmarks.options import note
from benchmarks.problems import dtype_name, parse_dtype
from benchmarks.shapes import LLAMA_SHAPES, LlamaShape, parse_llama_shape
from benchmarks.timing import Timing, spread_of, time_interleaved

__all__ = ["Report", "Session"]

GENERATE = "generate"


@dataclass
class Report:
    """Everything that one run measured.

    Attributes:
        rows: models, by prompt.
        profiles: by name of a row and its prompt, where the time of its steps goes.
        unavailable: models that could not be measured, with the reason.
        memory_before: bytes resident, or allocated on the GPU, before any model.
    """

    rows: list[ModelRow] = field(default_factory=list)
    profiles: dict[str, Profile] = field(default_factory=dict)
    unavailable: dict[str, str] = field(default_factory=dict)
    memory_before: int | None = None


@dataclass(frozen=True)
class _Candidate:
    """A model to be timed; ``part_of`` names the extrapolated row that it serves, if it has none itself."""

    name: str
    model: Any
    linears: str
    bpw: float | None
    form: str
    head: str
    step: str
    memory: Memory | None = None
    part_of: str | None = None

    @property
    def layers(self) -> int:
        count: int = self.model.config.num_hidden_layers
        return count


class Session:
    """The models of one run; models that differ in steps or layers only share their weights.

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
        self._forms = list(dict.fromkeys(options.forms))
        self._heads = list(dict.fromkeys(options.heads))
        most = min(options.dense_layers or (self.layers if gpu else 4), self.layers)
        self._dense_counts = [self.layers] if most == self.layers else [most // 2, most]
        limit = options.memory_gib or (torch.cuda.mem_get_info(device)[1] / 2**30 if gpu else 12)
        self.options = options
        self._check(limit)
        generator = torch.Generator().manual_seed(0)
        size = (options.rows, max(options.prompt))
        self._ids = torch.randint(self.shape.vocabulary, size, generator=generator).to(device)
        self._unavailable: dict[str, str] = {}

    def _check(self, memory_gib: float) -> None:
        """Refuse what cannot be measured before anything is built."""
        options = self.options
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
        copies = (PLAIN in self._forms) + (LOADED in self._forms) * len(self._heads)
        needed += sum(
            int(self.shape.linear_macs(self.layers) * bpw / 8 * 1.1) * copies for bpw in options.bpw
        )
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
        with tempfile.TemporaryDirectory() as folder:
            return self._measure(Path(folder))

    def _measure(self, folder: Path) -> Report:
        self._warm_up()
        report = Report(memory_before=MemoryWatch(self.device).before, unavailable=self._unavailable)
        candidates = list(self._candidates(folder))
        for name, reason in self._unavailable.items():
            note(f"not measured: {name}: {reason}")
        if not candidates:
            if self._unavailable:
                return report
            raise ValueError("bpw and dense must name one model at least, got none")
        for prompt in self.options.prompt:
            note(f"timing {len(candidates)} models, prompt of {prompt} tokens")
            decodes = {one.name: self._decode(one, prompt) for one in candidates}
            timings = time_interleaved(decodes, repetitions=self.options.rounds, timer=DecodeTimer())
            measured = [(one, _row(one, decodes[one.name], timings[one.name], prompt)) for one in candidates]
            report.rows += _with_extrapolated(measured, self.layers)
            report.rows += self._llama_cpp(folder, prompt)
            rounds = min(self.options.rounds, 3)
            for one in candidates if self.options.profile else ():
                decode = decodes[one.name]
                if one.layers == self.layers and isinstance(decode, GenerateDecode | LoadedDecode):
                    report.profiles[f"{one.name}, prompt {prompt}"] = profile_decode(decode, rounds)
        add_speedups([row for row in report.rows if row.layers == self.layers])
        return report

    def _warm_up(self) -> None:
        """Decode with a small model, so that what loads on first use does not count as a model's memory."""
        tiny = LLAMA_SHAPES["tiny"]
        model = build_packed(tiny, 1, 1.0, self.dtype, device=self.device)
        GenerateDecode(model, self._ids[:1, :4] % tiny.vocabulary, self.options.tokens)()
        if LOADED in self._forms:
            with tempfile.TemporaryDirectory() as folder:
                model = load_random(
                    Path(folder, "tiny"), tiny, 1, 1.0, self.dtype, paths=2, head="int8", device=self.device
                )
                LoadedDecode(model, self._ids[:1, :4] % tiny.vocabulary, self.options.tokens)()

    def _candidates(self, folder: Path) -> Iterator[_Candidate]:
        paths = self.options.paths
        for bpw in self.options.bpw:
            for form, head in self._packed_kinds():
                name = f"packed {bpw:g} bpw, {form}" + ("" if head == "keep" else f", {head} head")
                note(f"building {name}")
                watch = MemoryWatch(self.device)
                if form == PLAIN:
                    model = build_packed(
                        self.shape, self.layers, bpw, self.dtype, paths=paths, device=self.device
                    )
                else:
                    where = folder / f"{bpw}-{head}"
                    model = load_random(
                        where,
                        self.shape,
                        self.layers,
                        bpw,
                        self.dtype,
                        paths=paths,
                        head=head,
                        device=self.device,
                    )
                yield from self._of_model(name, model, "packed", bpw, form, head, watch)
        for dtype in self._dense_dtypes:
            yield from self._dense(dtype)

    def _packed_kinds(self) -> Iterator[tuple[str, str]]:
        for form in self._forms:
            for head in ["keep"] if form == PLAIN else self._heads:
                yield form, head

    def _dense(self, dtype: torch.dtype) -> Iterator[_Candidate]:
        name = f"dense {dtype_name(dtype)}"
        counts = self._dense_counts
        note(f"building {name}, {counts[-1]} layers")
        watch = MemoryWatch(self.device)
        model = build_dense(self.shape, counts[-1], dtype, device=self.device)
        if len(counts) == 1:
            yield from self._of_model(name, model, "dense", None, PLAIN, "keep", watch)
            return
        for count in counts:
            part = model if count == counts[-1] else twin(model, self.shape, layers=count)
            label = f"{name}, {count} layers"
            yield from self._of_model(label, part, "dense", None, PLAIN, "keep", None, part_of=name)

    def _of_model(
        self,
        name: str,
        model: Any,
        linears: str,
        bpw: float | None,
        form: str,
        head: str,
        watch: MemoryWatch | None,
        part_of: str | None = None,
    ) -> Iterator[_Candidate]:
        """The model with every kind of step; ``watch`` began before it was built."""
        for step in self.steps:
            more = "" if step == GENERATE else f", {step}"
            found = _Candidate(
                name + more,
                model,
                linears,
                bpw,
                form,
                head,
                step,
                part_of=None if part_of is None else part_of + more,
            )
            try:
                self._decode(found, min(self.options.prompt))()
            except Exception as error:
                # Whatever stops one of them, a missing compiler for instance, the others can be measured.
                reason = next(iter(str(error).splitlines()), "")
                self._unavailable[found.name] = f"{type(error).__name__}: {reason}"
                continue
            memory = None if watch is None else watch.read()
            watch = None
            yield _Candidate(**{**vars(found), "memory": memory})

    def _decode(self, candidate: _Candidate, prompt: int) -> Decode:
        ids, tokens = self._ids[:, :prompt], self.options.tokens
        if candidate.step != GENERATE:
            return StaticDecode(candidate.model, ids, tokens, candidate.step)
        kind = LoadedDecode if candidate.form == LOADED else GenerateDecode
        return kind(candidate.model, ids, tokens)

    def _llama_cpp(self, folder: Path, prompt: int) -> list[ModelRow]:
        """Rows of llama.cpp's models, extrapolated; none without a binary, or for a longer prompt."""
        options = self.options
        if options.llama_bench is None or prompt > options.llama_bench_prompt:
            return []
        rows: list[ModelRow] = []
        for kind in llama_cpp.TYPES:
            name = f"llama.cpp {kind}"
            parts = []
            try:
                for layers in (2, 4):
                    path = folder / f"{kind}-{layers}.gguf"
                    if not path.exists():
                        note(f"writing {name}, {layers} layers")
                        llama_cpp.write_gguf(path, self.shape, layers, kind)
                    note(f"timing {name}, {layers} layers, prompt of {prompt} tokens")
                    steps, prefill = llama_cpp.time_llama_bench(
                        options.llama_bench,
                        path,
                        prompt,
                        options.tokens,
                        threads=options.threads,
                        rounds=options.rounds,
                    )
                    size = path.stat().st_size
                    parts.append(_llama_cpp_row(name, kind, layers, steps, prefill, size, prompt))
            except (RuntimeError, ValueError) as error:
                self._unavailable[name] = f"{type(error).__name__}: {error}"
                note(f"not measured: {name}: {error}")
                continue
            rows += [*parts, extrapolated_row(name, parts[0], parts[1], self.layers)]
        return rows


def _row(candidate: _Candidate, decode: Decode, timing: Timing, prompt: int) -> ModelRow:
    spread = spread_of(decode.steps)
    return ModelRow(
        name=candidate.name,
        linears=candidate.linears,
        bpw=candidate.bpw,
        form=candidate.form,
        head=candidate.head,
        dtype=dtype_name(decode.model.dtype),
        step=candidate.step,
        prompt=prompt,
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


def _llama_cpp_row(
    name: str, kind: str, layers: int, steps: Sequence[float], prefill: float, size: int, prompt: int
) -> ModelRow:
    spread = spread_of(steps)
    return ModelRow(
        name=f"{name}, {layers} layers",
        linears="llama.cpp",
        bpw=None,
        form=PLAIN,
        head=llama_cpp.HEAD_TYPE,
        dtype=kind,
        step=GENERATE,
        prompt=prompt,
        layers=layers,
        measured_layers=[layers],
        samples=list(steps),
        median=spread.median,
        low=spread.low,
        high=spread.high,
        fastest=min(steps),
        prefill=prefill,
        weight_bytes=size,
    )


def _with_extrapolated(measured: Sequence[tuple[_Candidate, ModelRow]], layers: int) -> list[ModelRow]:
    rows = [row for _, row in measured]
    for name in dict.fromkeys(one.part_of for one, _ in measured if one.part_of):
        parts = [row for one, row in measured if one.part_of == name]
        # A kind of step can fail at one number of layers.
        if len(parts) == 2:
            rows.append(extrapolated_row(name, parts[0], parts[1], layers))
    return rows
