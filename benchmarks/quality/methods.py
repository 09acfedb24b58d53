"""Errors and times of quantization methods on single weights: the parts errors, itq and batches."""

from __future__ import annotations

import math
import statistics
import time
from argparse import Namespace
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmarks.markdown import markdown
from benchmarks.options import note
from benchmarks.quality.minilm import encoder_weights
from littlebit2.quantize import QuantConfig, QuantizedLayer, rank_for_bpw
from littlebit2.quantize.quantizer import DenseLayer, quantize_together
from littlebit2.quantize.solvers.admm import admm
from littlebit2.quantize.solvers.binary_path import BinaryPath
from littlebit2.quantize.solvers.dual_svid import dual_svid
from littlebit2.quantize.solvers.joint_itq import joint_itq
from littlebit2.quantize.solvers.refine import refine
from littlebit2.quantize.solvers.svd import truncated_factors
from littlebit2.quantize.spectrum import energy_share
from littlebit2_kernels.format import PackedLinear, PackedPath
from littlebit2_kernels.reference import dense_weight

#: Spectra ``k^-decay`` of the synthetic 512 x 512 weights.
DECAYS = (0.3, 0.6, 1.0)
SYNTHETIC_SIZE = 512
#: Joint-ITQ is timed where R is at least 1000: 2048 x 2048 at 1.0 bpw.
ITQ_SIZE = 2048
ITQ_ITERATIONS = (6, 8, 15)
#: Layers quantized together.
BATCH = 6
#: Refined error relative to the SVD-based Joint-ITQ's.
GOALS = {1.0: 0.65, 0.55: 0.85, 0.3: 0.93}


@dataclass(frozen=True)
class Outcome:
    """One method on one weight."""

    weight: str
    group: str
    bpw: float
    rank: int
    method: str
    error: float
    seconds: float
    gain: float  # energy kept, minus that of an FP16 pair of rank R / 16


# --- errors and seconds of each method ---------------------------------------------------------------


def errors(options: Namespace) -> list[dict[str, Any]]:
    """Every method on every weight, one path, at equal ranks."""
    outcomes = []
    for name, group, weight in weights(options.layers):
        for bpw in options.bpw:
            outcomes += methods(name, group, weight, bpw, options.iterations)
            note(f"{name} at {bpw:g} bpw")
    print(error_table(outcomes))
    print()
    print(goal_table(outcomes))
    return [asdict(outcome) for outcome in outcomes]


def weights(layers: int | None) -> Iterable[tuple[str, str, torch.Tensor]]:
    """MiniLM's encoder layers and the synthetic weights, each with the group it is averaged in."""
    for name, weight in list(encoder_weights().items())[:layers]:
        yield name, "MiniLM {} x {}".format(*weight.shape), weight
    for decay in DECAYS:
        yield f"k^-{decay:g}", f"k^-{decay:g}", synthetic(SYNTHETIC_SIZE, decay)


def synthetic(size: int, decay: float) -> torch.Tensor:
    """A square weight of spectrum ``k^-decay`` with random singular vectors."""
    rng = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(size, size, generator=rng)).Q for _ in range(2))
    return left * torch.arange(1, size + 1) ** -decay @ right


def methods(name: str, group: str, weight: torch.Tensor, bpw: float, iterations: int) -> list[Outcome]:
    """Run all methods on one weight, each with the seconds it takes from the weight to the stored path."""
    weight = weight / weight.abs().max()
    rank = rank_for_bpw(weight.shape[1], weight.shape[0], bpw, paths=1)
    tiny = energy_share(torch.linalg.svdvals(weight), rank / 16)

    def plain_svd() -> PackedPath:
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        half = values[:rank].sqrt()
        return dual_svid(left[:, :rank] * half, half[:, None] * right[:rank])

    def rotated(iterations: int, **options: Any) -> PackedPath:
        factors = truncated_factors(weight, rank)
        latent = joint_itq(factors.a, factors.b, iterations, generator=seeded(), in_place=True, **options)
        return dual_svid(latent.a, latent.b)

    def refined() -> PackedPath:
        path = BinaryPath.from_packed([rotated(15)], weight.dtype)
        refine(weight, path, 12)
        return path.packed()[0]

    def factorized() -> PackedPath:
        n, k = weight.shape
        path = BinaryPath.random((n, k), rank, [float(weight.square().mean().sqrt())], [seeded()])
        admm(weight, path, iterations)
        refine(weight, path, 12)
        return path.packed()[0]

    def outcome(method: str, make: Callable[[], PackedPath]) -> Outcome:
        start = time.perf_counter()
        path = make()
        seconds = time.perf_counter() - start
        error = path_error(weight, path)
        return Outcome(name, group, bpw, rank, method, error, seconds, 1 - error - tiny)

    return [
        outcome("Dual-SVID, SVD", plain_svd),
        outcome("Joint-ITQ, 50 SVDs", lambda: rotated(50, polar="svd", look_ahead=0.0)),
        outcome("joint-itq", lambda: rotated(15)),
        outcome("refine", refined),
        outcome("admm", factorized),
    ]


def seeded() -> torch.Generator:
    """The same start for every method."""
    return torch.Generator().manual_seed(0)


def path_error(weight: torch.Tensor, path: PackedPath) -> float:
    """Squared relative Frobenius error of what is stored."""
    rest = weight.double() - dense_weight(PackedLinear((path,)))
    return float(rest.square().sum() / weight.double().square().sum())


def by(outcomes: Iterable[Outcome], **wanted: object) -> list[Outcome]:
    """The outcomes whose fields are as wanted."""
    return [o for o in outcomes if all(getattr(o, field) == value for field, value in wanted.items())]


def error_table(outcomes: list[Outcome]) -> str:
    """Mean error and seconds of each method by group of weights and bits per weight."""
    names = list(dict.fromkeys(o.method for o in outcomes))
    rows = []
    for group in dict.fromkeys(o.group for o in outcomes):
        for bpw in dict.fromkeys(o.bpw for o in outcomes):
            rank = by(outcomes, group=group, bpw=bpw)[0].rank
            cells = []
            for method in names:
                found = by(outcomes, group=group, bpw=bpw, method=method)
                error = statistics.fmean(o.error for o in found)
                cells.append(f"{error:.3f} ({statistics.fmean(o.seconds for o in found):.2f} s)")
            gain = statistics.fmean(o.gain for o in by(outcomes, group=group, bpw=bpw, method=names[-1]))
            rows.append([group, f"{bpw:g}", str(rank), *cells, f"{gain:+.2f}"])
    return markdown(["weight", "bpw", "R", *names, "gain of admm"], rows)


def goal_table(outcomes: list[Outcome]) -> str:
    """Error relative to the SVD-based Joint-ITQ: geometric mean and range over MiniLM, and each spectrum."""
    rows = []
    for method in ("joint-itq", "refine", "admm"):
        for bpw in dict.fromkeys(o.bpw for o in outcomes):
            base = {o.weight: o.error for o in by(outcomes, bpw=bpw, method="Joint-ITQ, 50 SVDs")}
            ratio = {o.weight: o.error / base[o.weight] for o in by(outcomes, bpw=bpw, method=method)}
            real = [value for name, value in ratio.items() if not name.startswith("k^")]
            rows.append(
                [
                    method,
                    f"{bpw:g}",
                    f"{GOALS[bpw]:g}" if bpw in GOALS else "",
                    f"{math.exp(statistics.fmean(map(math.log, real))):.3f}" if real else "",
                    f"{min(real):.3f}-{max(real):.3f}" if real else "",
                    *(f"{ratio[f'k^-{decay:g}']:.3f}" for decay in DECAYS),
                ]
            )
    head = ["method", "bpw", "goal", "MiniLM, geometric mean", "range", *(f"k^-{d:g}" for d in DECAYS)]
    return markdown(head, rows)


# --- the speed of Joint-ITQ -----------------------------------------------------------------------------


def itq(options: Namespace) -> list[dict[str, Any]]:
    """Joint-ITQ alone, from the same factors: ours against 50 SVD-based iterations, interleaved, twice."""
    rank = rank_for_bpw(ITQ_SIZE, ITQ_SIZE, 1.0, paths=1)
    rows: list[dict[str, Any]] = []
    for decay in (0.3, 0.6):
        weight = synthetic(ITQ_SIZE, decay)
        weight /= weight.abs().max()
        factors = truncated_factors(weight, rank)
        variants: dict[str, Callable[[], Any]] = {
            "50 SVDs": lambda f=factors: joint_itq(
                f.a, f.b, 50, generator=seeded(), polar="svd", look_ahead=0.0
            ),
            **{
                f"{count} look-ahead": lambda f=factors, n=count: joint_itq(f.a, f.b, n, generator=seeded())
                for count in ITQ_ITERATIONS
            },
        }
        seconds: dict[str, list[float]] = {name: [] for name in variants}
        reached: dict[str, tuple[float, float]] = {}
        for _ in range(2):
            for name, run in variants.items():
                start = time.perf_counter()
                latent = run()
                seconds[name].append(time.perf_counter() - start)
                error = path_error(weight, dual_svid(latent.a, latent.b))
                reached[name] = (latent.objective[-1], error)
                note(f"Joint-ITQ, {name}, k^-{decay:g}")
        for name, times in seconds.items():
            ratios = [slow / fast for slow, fast in zip(seconds["50 SVDs"], times, strict=True)]
            rows.append(
                {
                    "spectrum": f"k^-{decay:g}",
                    "rank": rank,
                    "variant": name,
                    "alignment": reached[name][0],
                    "error": reached[name][1],
                    "seconds": statistics.median(times),
                    "faster": statistics.median(ratios),
                }
            )
    cells = [
        [
            row["spectrum"],
            str(row["rank"]),
            row["variant"],
            f"{row['alignment']:.4f}",
            f"{row['error']:.4f}",
            f"{row['seconds']:.1f}",
            f"{row['faster']:.1f}x",
        ]
        for row in rows
    ]
    print(markdown(["spectrum", "R", "iterations", "alignment", "error", "s", "faster"], cells))
    print()
    return rows


# --- several layers at once -------------------------------------------------------------------------------


def batches(options: Namespace) -> list[dict[str, Any]]:
    """Layers of one shape alone and together: seconds of processor time, in turns, the least of two."""
    chosen = [w for w in encoder_weights().values() if w.shape == (384, 384)][:BATCH]
    rows: list[dict[str, Any]] = []
    for bpw in options.bpw:
        rank = rank_for_bpw(384, 384, bpw, paths=1)
        layers = [
            DenseLayer(
                weight.clone, QuantConfig(ranks=(rank,), admm_iterations=options.iterations, seed=seed)
            )
            for seed, weight in enumerate(chosen)
        ]
        ways: dict[str, Callable[[], list[QuantizedLayer]]] = {
            "alone": lambda layers=layers: [quantize_together([layer])[0] for layer in layers],
            "together": lambda layers=layers: quantize_together(layers),
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        made: dict[str, list[QuantizedLayer]] = {}
        for _ in range(2):
            for name, run in ways.items():
                start = time.process_time()
                made[name] = run()
                seconds[name].append(time.process_time() - start)
        same = all(
            torch.equal(mine, other)
            for one, two in zip(*made.values(), strict=True)
            for mine, other in zip(one.packed.unique_tensors(), two.packed.unique_tensors(), strict=True)
        )
        alone, together = (min(times) for times in seconds.values())
        rows.append({"bpw": bpw, "rank": rank, "alone": alone, "together": together, "same_bits": same})
        note(f"batches at {bpw:g} bpw")
    cells = [
        [f"{r['bpw']:g}", str(r["rank"]), f"{r['alone']:.2f}", f"{r['together']:.2f}", f"{r['same_bits']}"]
        for r in rows
    ]
    head = ["bpw", "R", f"{len(chosen)} layers alone, s", "together, s", "same bits"]
    print(markdown(head, cells))
    print()
    return rows
