"""``littlebit2 quantize``: a dense checkpoint to a packed one."""

from __future__ import annotations

import argparse
import json
import os
from typing import TYPE_CHECKING, Any

from littlebit2.architecture.names import is_causal_name

from .blockwise import BLOCKWISE, add_blockwise_options, blockwise_outlook, is_blockwise, run_blockwise
from .common import (
    Commands,
    add_command,
    add_method_options,
    add_pattern_options,
    add_size_options,
    add_spectral_options,
    at_largest_rank,
    emit,
    emit_json,
    excluded,
    gigabytes,
    method_options,
    note,
    note_left,
    quant_config,
    rows_options,
    table,
)

if TYPE_CHECKING:
    from littlebit2.offline import RunReport

__all__ = ["add_parser", "add_quantize_options", "add_run_options"]

#: Mean squared relative error of the weights from which a model's outputs are far from the dense model's.
_FAR = 0.05

_DESCRIPTION = """\
Quantize the linear layers of a dense checkpoint (safetensors and config.json). Embeddings, norms and
heads stay as they are. With text (--data) a causal language model is quantized block by block, each block
tuned to the output of the dense one; without, layer by layer, and a language model then needs training. One
block, or one layer per worker, is in memory, never the model. Killed at any moment, the same command
continues where it was (what is finished is kept in OUT.partial) and writes the same bytes.
"""

_EXAMPLES = """\
  littlebit2 quantize MODEL_DIR OUT --bpw 0.55 --data texts/
  littlebit2 quantize MODEL_DIR OUT --bpw 0.55 --data texts/ --budget kl    ranks by the model's output
  littlebit2 quantize MODEL_DIR OUT --bpw 0.55
  littlebit2 quantize MODEL_DIR OUT --bpw 0.55 --head int8 --embedding int8    the rest in int8
  littlebit2 quantize MODEL_DIR OUT --bpw 0.55 --budget spectral --importance calibration.safetensors
  littlebit2 quantize MODEL_DIR OUT --bpw 0.55 --method joint-itq    as LittleBit-2 initializes it
  littlebit2 quantize MODEL_DIR OUT --bpw 0.1 --kv-factor 2 --exclude "model.layers.0.*" --workers 4
  torchrun --nproc-per-node 4 -m littlebit2 quantize MODEL_DIR OUT --bpw 0.55
"""


def add_parser(commands: Commands) -> None:
    """Add the subcommand."""
    parser = add_command(
        commands,
        "quantize",
        _run,
        summary="dense checkpoint to packed checkpoint, streamed and resumable",
        description=_DESCRIPTION,
        examples=_EXAMPLES,
        after_interrupt="; the same command continues from here",
    )
    parser.add_argument("model_dir", metavar="MODEL_DIR", help="directory of the dense checkpoint")
    parser.add_argument("out", metavar="OUT", help="directory to make")
    add_quantize_options(parser)
    add_run_options(parser)
    parser.add_argument(
        "--json", action="store_true", help="print the per-layer report, with timings, as JSON"
    )


def add_quantize_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say what is packed and how, which ``plan`` takes too."""
    size = add_size_options(
        parser, {BLOCKWISE: "admm on few iterations, each block tuned on text (the default with --data)"}
    )
    add_spectral_options(parser, size, text=True)
    add_method_options(parser)
    add_blockwise_options(parser)
    parser.add_argument("--seed", type=int, default=0, help="seed for rotations and random signs (default 0)")
    add_pattern_options(parser, int8=True)


def add_run_options(parser: Any) -> None:
    """Add the options that say how the work is done, to a parser or a group of options."""
    parser.add_argument(
        "--workers", type=int, help="layers quantized at a time (default: by cores and free memory)"
    )
    parser.add_argument(
        "--threads",
        type=int,
        help="threads per layer or block; changes the last bits (default 1; block by block: all)",
    )
    parser.add_argument(
        "--device", default="cpu", help="device to compute on: cpu, cuda, cuda:1 (default cpu)"
    )
    parser.add_argument(
        "--no-trial", action="store_true", help="do not load the result and run it once at the end"
    )
    parser.add_argument("--restart", action="store_true", help="discard an interrupted run")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT at the end if it exists")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def _rehearse(out: str) -> None:
    """Load the result and run it once; say so where that cannot be done."""
    from littlebit2.offline.rehearsal import rehearse  # noqa: PLC0415  # imports torch

    remark = rehearse(out)
    if remark is not None:
        note(f"{out}: {remark}")


def _layerwise(args: argparse.Namespace) -> RunReport:
    from littlebit2.offline import quantize_checkpoint  # noqa: PLC0415  # imports torch
    from littlebit2.quantize import load_importance  # noqa: PLC0415  # imports torch

    return quantize_checkpoint(
        args.model_dir,
        args.out,
        quant_config(
            args,
            energy=args.energy,
            budget=args.budget,
            **method_options(args),
            seed=args.seed,
        ),
        include=args.include,
        exclude=excluded(args),
        **rows_options(args),
        importance=None if args.importance is None else load_importance(args.importance),
        workers=args.workers,
        threads=1 if args.threads is None else args.threads,
        device=args.device,
        progress=not args.quiet,
        resume=not args.restart,
        overwrite=args.overwrite,
    )


def _run(args: argparse.Namespace) -> int:
    blockwise = run_blockwise(args) if is_blockwise(args) else None
    report = _layerwise(args) if blockwise is None else blockwise.run
    if os.environ.get("RANK", "0") != "0":
        return 0  # under torchrun one process speaks for all
    if args.json:
        content = report.as_dict(timings=True)
        if blockwise is not None:
            content["blockwise"] = {**blockwise.as_dict(), "seconds": blockwise.seconds}
        emit_json(content)
        return 0
    if not args.no_trial:
        _rehearse(args.out)
    totals = report.totals()
    emit(
        f"{args.out}: {totals['layers']} layers, counted {totals['counted_bpw']:.4f} bpw, "
        f"stored {totals['stored_bpw']:.4f} bpw"
    )
    emit(
        f"squared relative error: mean {totals['mean_error']:.4f}, "
        f"worst {totals['worst_error']:.4f} ({totals['worst_layer']})"
    )
    full = at_largest_rank(report.at_largest_rank, args)
    if full is not None:
        emit(full)
    note_left(report.left)
    if "mean_predicted_error" in totals:
        kind = " weighted by importance" if args.importance is not None else ""
        emit(
            f"squared relative error{kind}: predicted from the spectra {totals['mean_predicted_error']:.4f}, "
            f"achieved {totals['mean_minimized_error']:.4f}"
        )
    emit(_packed(report))
    if blockwise is None:
        _outlook(report, args)
    else:
        blockwise_outlook(blockwise, args)
    if args.keep_work:
        emit(f"{args.out}.partial: the work folder, which --keep-work keeps")
    return 0


def _packed(report: RunReport) -> str:
    """Return what is packed, what is not and why, and what it weighs."""
    totals = report.totals()
    rows: list[tuple[object, ...]] = [("packed", totals["layers"], "")]
    rows += [
        (f"dense: {reason}", len(names), names[0] + (", ..." if len(names) > 1 else ""))
        for reason, names in sorted(report.reasons.items(), key=lambda item: -len(item[1]))
    ]
    lines = [table(("matrices", "count", "for example"), rows), *report.notes]
    if report.bytes:
        before, after = report.bytes["before"], report.bytes["after"]
        lines.append(f"weight files: {gigabytes(before)} before, {gigabytes(after)} after")
    return "\n".join(lines)


def _is_causal(folder: str) -> bool:
    """Whether a checkpoint is a causal language model, to judge by the class that its configuration names."""
    with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
        named = json.load(file).get("architectures") or ["ForCausalLM"]
    return is_causal_name(str(named[0]))


def _outlook(report: RunReport, args: argparse.Namespace) -> None:
    """Print what to expect of a model that was quantized without text, and what to do next."""
    mean = report.totals()["mean_error"]
    kept = (
        f"layers keep {1 - mean:.0%} of their weights' energy on average: expect outputs far from the dense "
        "model's"
    )
    if not _is_causal(args.out):
        # The other commands evaluate, train and tune causal language models.
        if mean > _FAR:
            emit(f"{kept}; more bits (--bpw), or fewer layers (--exclude), bring them nearer")
        emit("next, in Python:")
        emit(f"  model = littlebit2.load({args.out!r})")
        return
    if mean <= _FAR:
        emit("next:")
        emit(f"  littlebit2 evaluate {args.out} --data TEXT")
        return
    emit(f"{kept} until it is trained, or quantized again with text. Next:")
    emit(f"  littlebit2 finetune {args.model_dir} TRAINED --data TEXT --start {args.out}")
    rows = "".join(f" --{name} {value}" for name, value in rows_options(args).items() if value != "keep")
    if rows:  # training keeps them dense
        emit(f"  littlebit2 convert TRAINED SMALL --to littlebit2{rows}")
    size = "" if args.bpw is None else f" --bpw {args.bpw:g}"
    emit(f"  littlebit2 quantize {args.model_dir} OUT{size}{rows} --data TEXT")
    emit("The model writes such a TEXT itself, where there is none:")
    emit(f"  littlebit2 write-text {args.model_dir} TEXT.jsonl")
