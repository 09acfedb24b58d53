"""``python -m benchmarks.quality.quantizer``: what each quantisation method reaches, and in what time.

Prints markdown tables and writes the rows as JSON, with plots, to ``build/quantizer`` (``--out``).
Everything is computed in one process, on one thread unless ``--threads`` says otherwise. Errors are squared
relative Frobenius errors of one path. The baselines stand beside ours in the same run: Dual-SVID from a
plain SVD, and Joint-ITQ with 50 iterations whose Procrustes steps are SVDs, as LittleBit-2 describes it.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.markdown import markdown
from benchmarks.quality.minilm import CALIBRATION, EVALUATION, embed, encoder, encoder_weights, load_model
from littlebit2 import quantize_
from littlebit2.quantize import (
    Importance,
    LayerReport,
    QuantConfig,
    QuantizedLayer,
    collect_importance,
    rank_for_bpw,
)
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

BPWS = (0.3, 0.55, 1.0)
#: Spectra ``k^-decay`` of the synthetic 512 x 512 weights.
DECAYS = (0.3, 0.6, 1.0)
SYNTHETIC_SIZE = 512
#: Joint-ITQ is timed where R is at least 1000: 2048 x 2048 at 1.0 bpw.
ITQ_SIZE = 2048
ITQ_ITERATIONS = (6, 8, 15)
#: Layers quantised together.
BATCH = 6
#: Refined error relative to the SVD-based Joint-ITQ's.
GOALS = {1.0: 0.65, 0.55: 0.85, 0.3: 0.93}
PARTS = ("errors", "itq", "batches", "model")


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
    gain: float  # energy kept less that of an FP16 pair of rank R / 16


@dataclass(frozen=True)
class Agreement:
    """A whole model at one budget."""

    bpw: float
    name: str
    cosine: float
    worst: float
    counted_bpw: float
    error: float
    predicted: float | None
    seconds: float


def main(argv: list[str] | None = None) -> int:
    """Run the parts that are asked for; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality.quantizer", description=__doc__.split("\n")[0]
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--layers", type=int, help="only the first layers of MiniLM, for a quick look")
    parser.add_argument("--iterations", type=int, default=300, help="of ADMM (default 300)")
    parser.add_argument("--bpw", type=float, nargs="+", default=list(BPWS), help="bits per weight")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("build/quantizer"))
    args = parser.parse_args(argv)
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"PART must be one of {', '.join(PARTS)}, got {', '.join(sorted(unknown))}")
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    print(f"torch {torch.__version__}, {platform.machine()}, {args.threads} thread(s)\n")
    for part in args.parts or PARTS:
        rows = {"errors": errors, "itq": itq, "batches": batches, "model": model}[part](args)
        (args.out / f"{part}.json").write_text(json.dumps(rows, indent=1))
    return 0


# --- errors and seconds of each method ---------------------------------------------------------------


def errors(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every method on every weight, one path, at equal ranks."""
    outcomes = []
    for name, group, weight in weights(args.layers):
        for bpw in args.bpw:
            outcomes += methods(name, group, weight, bpw, args.iterations)
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

    def factorised() -> PackedPath:
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
        outcome("admm", factorised),
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


def itq(args: argparse.Namespace) -> list[dict[str, Any]]:
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


def batches(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Layers of one shape alone and together: seconds of processor time, in turns, the least of two."""
    chosen = [w for w in encoder_weights().values() if w.shape == (384, 384)][:BATCH]
    rows: list[dict[str, Any]] = []
    for bpw in args.bpw:
        rank = rank_for_bpw(384, 384, bpw, paths=1)
        layers = [
            DenseLayer(weight.clone, QuantConfig(ranks=(rank,), admm_iterations=args.iterations, seed=seed))
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


# --- a whole model ----------------------------------------------------------------------------------


def model(args: argparse.Namespace) -> list[dict[str, Any]]:
    """All of MiniLM's encoder at equal total bits: uniform against spectral, without and with activations."""
    dense = load_model()
    truth = embed(dense, EVALUATION)
    importance = measure_importance(dense)
    results: list[Agreement] = []
    chosen: dict[str, Sequence[LayerReport]] = {}
    for bpw in args.bpw:
        for activations in (None, importance):
            for budget in ("uniform", "spectral"):
                name = f"{budget}, activations" if activations else budget
                config = QuantConfig(bpw=bpw, budget=budget, admm_iterations=args.iterations)  # type: ignore[arg-type]
                result, reports = agreement(dense, truth, name, config, activations)
                results.append(result)
                chosen[f"{name} at {bpw:g} bpw"] = reports
                note(f"MiniLM, {name}, {bpw:g} bpw: cosine {result.cosine:.3f}")
    cells = [
        [
            f"{r.bpw:g}",
            r.name,
            f"{r.counted_bpw:.4f}",
            f"{r.cosine:.3f}",
            f"{r.worst:.3f}",
            f"{r.error:.3f}",
            "" if r.predicted is None else f"{r.predicted:.3f}",
            f"{r.seconds:.0f}",
        ]
        for r in results
    ]
    head = ["bpw", "budget", "counted", "cosine, mean", "worst", "error", "predicted", "s"]
    print(markdown(head, cells))
    from benchmarks.quality.quantizer_plots import write_plots

    print(f"\nplots: {write_plots(args.out, encoder_weights(), chosen)}")
    return [asdict(result) for result in results]


def measure_importance(dense: Any) -> dict[str, Importance]:
    """Activations of the calibration sentences, and how much each layer's outputs move the embedding."""
    batch = dict(dense.tokenizer(list(CALIBRATION), padding=True, return_tensors="pt"))
    rng = seeded()

    def projected(output: Any) -> torch.Tensor:
        # The squared gradient of a random projection is that of the whole embedding, on average.
        mask = batch["attention_mask"].unsqueeze(-1)
        mean = (output.last_hidden_state * mask).sum(1) / mask.sum(1)
        unit = torch.nn.functional.normalize(mean)
        return (unit * (torch.randint(0, 2, unit.shape, generator=rng) * 2 - 1)).sum()

    found = collect_importance(encoder(dense), [batch] * 4, loss=projected)
    return {name: one for name, one in found.items() if name.startswith("encoder.")}


def agreement(
    dense: Any,
    truth: torch.Tensor,
    name: str,
    config: QuantConfig,
    importance: dict[str, Importance] | None,
) -> tuple[Agreement, tuple[LayerReport, ...]]:
    """Quantise a copy of the model and compare its embeddings with the dense ones."""
    packed = copy.deepcopy(dense)
    start = time.perf_counter()
    reports = quantize_(
        encoder(packed), config, include="encoder.*", importance=importance, progress=False
    ).layers
    seconds = time.perf_counter() - start
    cosines = (truth * embed(packed, EVALUATION)).sum(1)
    sizes = torch.tensor([report.in_features * report.out_features for report in reports]).double()

    def mean(values: list[float]) -> float:
        return float((torch.tensor(values).double() * sizes).sum() / sizes.sum())

    predicted = [report.predicted_error for report in reports]
    assert config.bpw is not None
    result = Agreement(
        bpw=config.bpw,
        name=name,
        cosine=float(cosines.mean()),
        worst=float(cosines.min()),
        counted_bpw=mean([report.counted_bpw for report in reports]),
        error=mean([r.error if r.weighted_error is None else r.weighted_error for r in reports]),
        predicted=None if None in predicted else mean([value or 0.0 for value in predicted]),
        seconds=seconds,
    )
    return result, reports


def note(text: str) -> None:
    """Say on stderr what was done: a run takes many minutes."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
