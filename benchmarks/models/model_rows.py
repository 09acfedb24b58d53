"""Rows of `whole-model`: one model timed beside the others, extrapolation in the number of layers, tables."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from benchmarks.markdown import markdown
from benchmarks.models.decode import PARTS, Profile
from benchmarks.models.memory import Memory
from benchmarks.timing import Timing, spread_of

__all__ = [
    "LOADED",
    "PLAIN",
    "ModelRow",
    "add_speedups",
    "extrapolate",
    "extrapolated_row",
    "models_table",
    "profile_table",
]


#: Packed models: built in memory and run as transformers runs any model, or loaded and run by littlebit2.
PLAIN, LOADED = "plain", "loaded"


@dataclass(frozen=True)
class ModelRow:
    """One model with one kind of step, timed together with all others of the run.

    Attributes:
        name: tells it from the others.
        linears: ``packed``, ``dense`` or ``llama.cpp``.
        bpw: counted bits per weight of the packed layers; ``None`` if dense.
        form: :data:`PLAIN` or :data:`LOADED`.
        head: ``keep``, ``int8`` or ``packed``; of llama.cpp, the head's type.
        dtype: dtype of activations and dense weights; of llama.cpp, the type of the linear layers.
        step: ``generate``, ``eager``, ``compile`` or ``graph``.
        prompt: tokens before the first step.
        layers: decoder layers.
        measured_layers: layers of the models that were measured; two numbers if the row is extrapolated.
        samples: median seconds of a step in each round.
        median: seconds of a step, median of ``samples``.
        low: lower quartile of all steps of all rounds; of ``samples`` if the row is extrapolated.
        high: their upper quartile.
        fastest: shortest of all steps of all rounds: the least disturbed one.
        prefill: median seconds up to the first token.
        weight_bytes: bytes of all weights and buffers of the model.
        memory: of the first row of a model that was measured whole.
        fixed_seconds: extrapolated rows: seconds of a step outside of the layers.
        layer_seconds: extrapolated rows: seconds of each layer.
        speedups: by name of another row, median and quartiles of the ratios within rounds.
    """

    name: str
    linears: str
    bpw: float | None
    form: str
    head: str
    dtype: str
    step: str
    prompt: int
    layers: int
    measured_layers: list[int]
    samples: list[float]
    median: float
    low: float
    high: float
    fastest: float
    prefill: float
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
        prefill=extrapolate(few.prefill, many.prefill, counts, layers)[0],
        weight_bytes=round(size),
        fixed_seconds=spread_of([fixed for _, fixed, _ in fits]).median,
        layer_seconds=spread_of([layer for _, _, layer in fits]).median,
    )


def add_speedups(rows: Sequence[ModelRow]) -> None:
    """Compare each packed row with rows of the same prompt that are not, and loaded ones with plain ones."""
    for row in rows:
        if row.linears != "packed":
            continue
        for peer in rows:
            if (peer.prompt, peer.step) != (row.prompt, row.step):
                continue
            plain = (peer.bpw, peer.form) == (row.bpw, PLAIN) and row.form == LOADED
            if plain or peer.linears != "packed":
                spread = Timing(tuple(row.samples)).speedup_spread(Timing(tuple(peer.samples)))
                row.speedups[PLAIN if plain else peer.name] = [spread.median, spread.low, spread.high]


def models_table(rows: Sequence[ModelRow]) -> str:
    """Every model: step, tokens per second, prefill, weights, memory, and ratios within rounds."""
    peers = [PLAIN, *dict.fromkeys(name for row in rows for name in row.speedups if name != PLAIN)]
    extrapolated = {row.name for row in rows if len(row.measured_layers) > 1}
    against = [f"vs {peer}" + (" (extrapolated)" if peer in extrapolated else "") for peer in peers]
    head = ["model", "prompt", "layers", "ms/token (quartiles)", "fastest", "tok/s", "first token ms"]
    head += ["weights MiB", "memory MiB (peak)", *against]
    return markdown(head, [_cells(row, peers) for row in rows])


def _cells(row: ModelRow, peers: Sequence[str]) -> list[str]:
    layers = str(row.layers)
    if len(row.measured_layers) > 1:
        layers += f", extrapolated from {' and '.join(map(str, row.measured_layers))} layers"
    memory = ""
    if row.memory is not None:
        peak = row.memory.peak
        memory = _mib(row.memory.growth) + ("" if peak is None else f" ({_mib(peak - row.memory.before)})")
    return [
        row.name,
        str(row.prompt),
        layers,
        f"{row.median * 1e3:.2f} ({row.low * 1e3:.2f}-{row.high * 1e3:.2f})",
        f"{row.fastest * 1e3:.2f}",
        f"{row.tokens_per_second:.2f}",
        f"{row.prefill * 1e3:.0f}",
        _mib(row.weight_bytes),
        memory,
        *(_ratio(row.speedups.get(peer)) for peer in peers),
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
