"""The block-by-block method of ``littlebit2 quantize``: its options, and what it prints."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from littlebit2._messages import SettingError

from .common import emit, excluded, method_options, note, quant_config, rows_options

if TYPE_CHECKING:
    from littlebit2.blockwise import BlockwiseReport
    from littlebit2.quantize import QuantConfig

__all__ = [
    "BLOCKWISE",
    "add_blockwise_options",
    "blockwise_config",
    "blockwise_outlook",
    "is_blockwise",
    "run_blockwise",
]

BLOCKWISE = "blockwise"
#: What tuning makes superfluous is left out.
_STEPS = {"admm_iterations": 30, "refine_rounds": 2}

#: Options and the names of their settings; defaults are those of BlockwiseSettings, which would import torch.
_SETTINGS = (
    (
        "--minutes",
        "minutes",
        float,
        "T",
        "time for everything; chooses --samples, --steps and --distill-steps for this machine",
    ),
    ("--samples", "samples", int, "N", "sequences for statistics and tuning (default 256)"),
    ("--length", "length", int, "T", "tokens per sequence (default 256)"),
    (
        "--held-out",
        "held_out",
        int,
        "N",
        "sequences on which errors and the perplexity are measured (default 8)",
    ),
    ("--steps", "steps", int, "N", "tuning steps per block; 0 disables tuning (default 200)"),
    ("--batch-size", "batch_size", int, "N", "sequences per tuning step (default 2)"),
    ("--lr", "lr", float, "RATE", "peak learning rate for latents (default 1e-3)"),
    (
        "--scale-lr",
        "scale_lr",
        float,
        "RATE",
        "the same for scales, norms and biases, relative to their size (default 3e-3)",
    ),
    (
        "--sensitivity",
        "sensitivity",
        float,
        "SHARE",
        "share of a block's loss weighted by what the model's output feels, 0 to 1 (default 0.7)",
    ),
    (
        "--kl-samples",
        "kl_samples",
        int,
        "N",
        "sequences on which ranks are tried, with --budget kl (default 3)",
    ),
    (
        "--distill-steps",
        "distill_steps",
        int,
        "N",
        "steps of distilling the whole model at the end (default 0: none); below 32 signs stay",
    ),
    (
        "--distill-minutes",
        "distill_minutes",
        float,
        "T",
        "time for the distillation instead; 0 disables it",
    ),
    ("--distill-samples", "distill_samples", int, "N", "sequences for the distillation (default 4096)"),
    (
        "--distill-lr",
        "distill_lr",
        float,
        "RATE",
        "peak learning rate for latents in the distillation, from 32 steps on (default 4e-5)",
    ),
    (
        "--distill-scale-lr",
        "distill_scale_lr",
        float,
        "RATE",
        "the same for scales, norms and biases (default 5e-3); below 32 steps twice that is taken",
    ),
)


def add_blockwise_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the method."""
    group = parser.add_argument_group("block by block, with text")
    group.add_argument(
        "--data",
        nargs="+",
        metavar="PATH",
        help="text: .txt, .md, .rst, .py, .jsonl (also .gz), .parquet, .arrow, or directories of these",
    )
    group.add_argument(
        "--text-field", default="text", help="name of the text in JSON lines and tables (default text)"
    )
    for option, name, kind, metavar, text in _SETTINGS:
        group.add_argument(option, dest=name, type=kind, metavar=metavar, help=text)
    group.add_argument(
        "--plot", metavar="FILE", help="draw errors by block and perplexities: .png, .svg or .pdf"
    )
    group.add_argument(
        "--keep-latents",
        action="store_true",
        help="keep in OUT how far signs are from flipping, for finetune --start (16 bits for each)",
    )
    group.add_argument("--keep-work", action="store_true", help="keep the work folder OUT.partial")


def is_blockwise(args: argparse.Namespace) -> bool:
    """Whether the command works block by block: where it is asked for, and where there is text.

    Raises:
        SettingError: options contradict one another.
    """
    asked = args.method == BLOCKWISE or (args.method == "auto" and args.data is not None)
    if asked and args.data is None:
        raise SettingError(f"--method {BLOCKWISE} needs text: --data PATH")
    mine = {
        "--data": args.data is not None,
        "--keep-work": args.keep_work,
        "--budget kl": args.budget == "kl",
        "--keep-latents": args.keep_latents,
        "--plot": args.plot is not None,
        **{option: getattr(args, name) is not None for option, name, *_ in _SETTINGS},
    }
    layerwise = {
        "--importance": args.importance is not None,
        "--workers": args.workers is not None,
        "--energy": args.energy is not None,
        "--budget spectral": args.budget == "spectral",
    }
    others = [option for option, given in (layerwise if asked else mine).items() if given]
    if others:
        how = f"not with --method {BLOCKWISE}" if asked else f"only with --method {BLOCKWISE} and --data"
        raise SettingError(f"{', '.join(others)}: {how}")
    if args.minutes is not None and any(
        getattr(args, name) is not None for name in ("samples", "steps", "distill_steps")
    ):
        raise SettingError("--minutes chooses --samples, --steps and --distill-steps: give one or the other")
    return asked


def blockwise_config(args: argparse.Namespace) -> QuantConfig:
    """Make the configuration of the layers."""
    steps = method_options(args, _STEPS)
    return quant_config(args, **steps, method="admm", budget=args.budget, seed=args.seed)


def run_blockwise(args: argparse.Namespace) -> BlockwiseReport:
    """Do the work that the options describe."""
    from littlebit2.blockwise import BlockwiseSettings, quantize_blockwise  # noqa: PLC0415  # imports torch
    from littlebit2.blockwise.plot import check_plot, plot_report  # noqa: PLC0415

    if args.plot is not None:
        check_plot(args.plot)
    given: dict[str, Any] = {name: getattr(args, name) for _, name, *_ in _SETTINGS}
    settings = BlockwiseSettings(
        seed=args.seed, **{name: value for name, value in given.items() if value is not None}
    )
    report = quantize_blockwise(
        args.model_dir,
        args.out,
        blockwise_config(args),
        args.data,
        settings,
        include=args.include,
        exclude=excluded(args),
        **rows_options(args),
        text_field=args.text_field,
        threads=args.threads,
        device=args.device,
        progress=not args.quiet,
        resume=not args.restart,
        overwrite=args.overwrite,
        keep_work=args.keep_work,
        keep_latents=args.keep_latents,
    )
    if args.plot is not None:
        plot_report(report, args.plot)
    return report


def blockwise_outlook(report: BlockwiseReport, args: argparse.Namespace) -> None:
    """Print the perplexities, whether the result is of use, and what to do next."""
    if report.allocation is not None:
        kl = report.allocation["kl"]
        sizes = [group["rank"] / group["uniform_rank"] for group in report.allocation["groups"]]
        emit(
            f"ranks by the KL of the output, {min(sizes):.2f} to {max(sizes):.2f} times the uniform; before "
            f"tuning, its sum over layers should be {kl['allocated']:.4g} instead of {kl['uniform']:.4g}"
        )
    stages = ", ".join(f"{stage} {value:.4g}" for stage, value in report.perplexity.items())
    emit(f"perplexity on {report.tokens} held-out tokens: {stages}")
    if report.dense_is_at_chance:
        note(f"warning: {args.out} is not usable: {report.unusable}. Give --data text of the model's kind")
        return
    if report.unusable is not None:
        more = "--samples, --steps and --distill-steps" if args.minutes is None else "--minutes"
        note(f"warning: {args.out} is not usable: {report.unusable}. Give it more {more}, or train it:")
        note(f"  littlebit2 finetune {args.model_dir} TRAINED --data TEXT --start {args.out}")
        return
    emit("next:")
    emit(f"  littlebit2 evaluate {args.out} --data TEXT")
    emit(f"  littlebit2 generate {args.out} 'The capital of France is'")
