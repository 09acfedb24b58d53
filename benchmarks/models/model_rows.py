"""Rows of `whole-model`: one model timed beside the others, extrapolation in the number of layers, tables."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from benchmarks.markdown import markdown
from benchmarks.models.decode import PARTS, Profile
from benchmarks.timing import Timing, spread_of

__all__ = [
    "Memory",
    "ModelRow",
    "add_speedups",
    "extrapolate",
    "extrapolated_row",
    "models_table",
    "profile_table",
]


@dataclass(frozen=True)
class Memory:
    """Bytes that are resident in this process, or allocated on the GPU.

    Attributes:
        before: before the model.
        after: with the model, after it decoded.
        peak: the most in between, or ``None`` where the system does not report it.
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
    """One model with one kind of step, timed together with all others of the run.

    Attributes:
        name: tells it from the others.
        linears: ``packed`` or ``dense``.
        bpw: counted bits per weight of the packed layers; ``None`` if dense.
        fused: whether projections on one input are one call.
        dtype: dtype of activations and dense weights.
        option: see :data:`benchmarks.models.llama_options.OPTIONS`.
        step: ``generate``, ``eager``, ``compile`` or ``graph``.
        layers: decoder layers.
        measured_layers: layers of the models that were measured; two numbers if the row is extrapolated.
        samples: median seconds of a step in each round.
        median: seconds of a step, median of ``samples``.
        low: lower quartile of all steps of all rounds; of ``samples`` if the row is extrapolated.
        high: their upper quartile.
        fastest: shortest of all steps of all rounds: the least disturbed one.
        prefill: median seconds up to the first token, or ``None`` if the row is extrapolated.
        weight_bytes: bytes of all weights and buffers of the model.
        memory: of the first row of a model that was measured whole.
        fixed_seconds: extrapolated rows: seconds of a step outside of the layers.
        layer_seconds: extrapolated rows: seconds of each layer.
        speedups: by name of another row, median and quartiles of the ratios within rounds.
    """

    name: str
    linears: str
    bpw: float | None
    fused: bool
    dtype: str
    option: str
    step: str
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
        """Decode rate of one sequence, without the prompt."""
        return 1 / self.median


def extrapolate(
    first: float, second: float, counts: tuple[int, int], layers: int
) -> tuple[float, float, float]:
    """Seconds of a step with ``layers`` layers, taken as linear in the number of layers.

    Args:
        first: seconds of a step with ``counts[0]`` layers.
        second: seconds of a step with ``counts[1]`` layers.
        counts: two numbers of layers, the smaller one first.
        layers: number of layers wanted.

    Returns:
        Seconds of the step, its part that does not depend on the number of layers, and seconds of each layer.

    Raises:
        ValueError: ``counts`` are not two increasing positive numbers.
    """
    if not 0 < counts[0] < counts[1]:
        raise ValueError(f"counts must be two increasing positive numbers of layers, got {counts}")
    layer = (second - first) / (counts[1] - counts[0])
    fixed = first - counts[0] * layer
    return fixed + layers * layer, fixed, layer


def extrapolated_row(name: str, few: ModelRow, many: ModelRow, layers: int) -> ModelRow:
    """The row of a model with ``layers`` layers, from rows with fewer, round by round."""
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


def add_speedups(rows: Sequence[ModelRow], default: str) -> None:
    """Compare each packed row with dense rows of its step, and with its model's row of option ``default``."""
    for row in rows:
        if row.linears == "dense":
            continue
        for peer in rows:
            same = (peer.bpw, peer.step, peer.fused) == (row.bpw, row.step, row.fused)
            plain = same and peer.option == default != row.option
            if plain or (peer.linears, peer.step) == ("dense", row.step):
                spread = Timing(tuple(row.samples)).speedup_spread(Timing(tuple(peer.samples)))
                row.speedups[peer.name] = [spread.median, spread.low, spread.high]


def models_table(rows: Sequence[ModelRow]) -> str:
    """Every model: step, tokens per second, prefill, weights, memory, and ratios within rounds."""
    peers = list(dict.fromkeys(name for row in rows for name in row.speedups if name.startswith("dense")))
    extrapolated = {row.name for row in rows if len(row.measured_layers) > 1}
    against = [f"vs {peer}" + (" (extrapolated)" if peer in extrapolated else "") for peer in peers]
    head = ["model", "layers", "ms/token (quartiles)", "fastest", "tok/s", "first token ms", "weights MiB"]
    head += ["memory MiB (peak)", *against, "vs as is"]
    return markdown(head, [_cells(row, peers) for row in rows])


def _cells(row: ModelRow, peers: Sequence[str]) -> list[str]:
    own = next((ratio for name, ratio in row.speedups.items() if name not in peers), None)
    layers = str(row.layers)
    if len(row.measured_layers) > 1:
        layers += f", extrapolated from {' and '.join(map(str, row.measured_layers))} layers"
    memory = ""
    if row.memory is not None:
        peak = row.memory.peak
        memory = _mib(row.memory.growth) + ("" if peak is None else f" ({_mib(peak - row.memory.before)})")
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


def profile_table(profiles: Mapping[str, Profile]) -> str:
    """Parts of a step by model, and below their sum a step without the clocks of the profile."""
    first = next(iter(profiles.values()))
    lines = [
        [part, *(f"{p.parts[part] * 1e3:.2f} ({p.shares[part]:.1%})" for p in profiles.values())]
        for part in sorted(PARTS, key=lambda part: -first.parts[part])
    ]
    lines.append(["step, sum of the above", *(f"{p.step * 1e3:.2f}" for p in profiles.values())])
    lines.append(["step without the clocks", *(f"{p.plain * 1e3:.2f}" for p in profiles.values())])
    return markdown(["ms of a step", *profiles], lines)
