"""``littlebit2 finetune``: a dense checkpoint and text to a trained, packed checkpoint."""

from __future__ import annotations

import argparse
import os
from typing import Any

from littlebit2._messages import SettingError

from .common import (
    Commands,
    add_command,
    add_method_options,
    add_pattern_options,
    add_size_options,
    add_spectral_options,
    emit,
    emit_json,
    excluded,
    method_options,
    quant_config,
    table,
)

_DESCRIPTION = """\
Quantize the dense checkpoint TEACHER, train the packed model against it on text (KL of the logits plus
hidden-state MSE), and write it packed. Killed at any moment, the same command continues from the last whole
training checkpoint in OUT.finetune. Perplexities are printed: of the teacher, after quantization, after
training, and of the packed checkpoint as it was written.
"""

_EXAMPLES = """\
  littlebit2 finetune MODEL_DIR OUT --data corpus/ --bpw 0.55
  littlebit2 finetune MODEL_DIR OUT --data c4.jsonl wiki.parquet --bpw 0.55 --init admm --block 2048 \\
      --batch-size 4 --accumulate 8 --lr 4e-5 --precision bfloat16 --gradient-checkpointing --device cuda
  littlebit2 finetune MODEL_DIR OUT --data corpus/ --start PACKED_DIR    from a packed checkpoint
  torchrun --nproc-per-node 8 -m littlebit2 finetune MODEL_DIR OUT --data corpus/ --bpw 0.55 --fsdp \\
      --device cuda
"""

_PRECISIONS = ("float32", "bfloat16", "float16")


def add_parser(commands: Commands) -> None:
    """Add the subcommand."""
    parser = add_command(
        commands,
        "finetune",
        _run,
        summary="dense checkpoint and text to a trained, packed checkpoint",
        description=_DESCRIPTION,
        examples=_EXAMPLES,
        after_interrupt="; the same command continues from the last checkpoint",
    )
    parser.add_argument("teacher", metavar="TEACHER", help="directory of the dense checkpoint")
    parser.add_argument("out", metavar="OUT", help="directory to make")
    _add_data_options(parser)
    start = parser.add_argument_group("quantization before training")
    start.add_argument(
        "--start", metavar="PACKED", help="begin with this packed checkpoint instead of quantizing TEACHER"
    )
    add_spectral_options(parser, add_size_options(parser))
    add_method_options(parser)
    parser.add_argument(
        "--quant-seed", type=int, default=0, help="seed for rotations and random signs (default 0)"
    )
    add_pattern_options(parser)
    _add_recipe_options(parser)
    _add_run_options(parser)


def _add_data_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data",
        nargs="+",
        required=True,
        metavar="PATH",
        help="text: .txt, .md, .rst, .py, .jsonl (also .gz), .parquet, .arrow, or directories of these",
    )
    parser.add_argument(
        "--eval-data", nargs="+", metavar="PATH", help="held-out text (default: the end of --data)"
    )
    parser.add_argument(
        "--hold-out",
        type=float,
        default=0.02,
        metavar="SHARE",
        help="share of --data held out without --eval-data (default 0.02; 0: none)",
    )
    parser.add_argument(
        "--text-field", default="text", help="name of the text in JSON lines and tables (default text)"
    )
    parser.add_argument("--max-tokens", type=int, metavar="N", help="read at most N tokens of --data")
    parser.add_argument(
        "--block", type=int, metavar="T", help="tokens per sequence (default 2048, or what TEACHER can take)"
    )


def _add_recipe_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("training; defaults are the papers' where they name one")
    group.add_argument("--steps", type=int, help="optimizer steps (default: from --epochs)")
    group.add_argument("--epochs", type=float, default=1.0, help="passes over the data (default 1)")
    group.add_argument(
        "--batch-size", type=int, default=1, help="sequences per process and batch (default 1)"
    )
    group.add_argument(
        "--accumulate", type=int, default=1, metavar="N", help="batches per optimizer step (default 1)"
    )
    group.add_argument("--lr", type=float, default=4e-5, help="peak learning rate for latents (default 4e-5)")
    group.add_argument(
        "--scale-lr", type=float, help="peak learning rate for scales of packed layers (default --lr)"
    )
    group.add_argument(
        "--dense-lr", type=float, help="peak learning rate for dense parameters (default --lr)"
    )
    group.add_argument(
        "--warmup", type=float, default=0.02, help="warm-up, as a share of the steps (default 0.02)"
    )
    group.add_argument(
        "--weight-decay", type=float, default=0.0, help="weight decay for dense matrices (default 0)"
    )
    group.add_argument(
        "--max-grad-norm",
        type=float,
        default=1.0,
        help="clip gradients to this norm (default 1; 0: do not clip)",
    )
    group.add_argument(
        "--hidden-weight",
        type=float,
        metavar="LAMBDA",
        help="weight of the hidden-state MSE (default 10; 0 with --teacher-top-k)",
    )
    group.add_argument("--surrogate", choices=("smooth-sign", "clipped"), default="smooth-sign")
    group.add_argument(
        "--dense",
        choices=("norms", "all", "none"),
        default="norms",
        help="dense parameters to train as well (default norms)",
    )
    group.add_argument(
        "--precision",
        choices=_PRECISIONS,
        default="float32",
        help="dtype of matrix products (default float32)",
    )
    group.add_argument("--teacher-precision", choices=_PRECISIONS, help="default: as stored")
    group.add_argument(
        "--teacher-top-k",
        type=int,
        metavar="K",
        help="run the teacher once and store its K likeliest tokens, so that it needs no memory in training",
    )
    group.add_argument("--gradient-checkpointing", action="store_true", help="recompute activations")
    group.add_argument("--fsdp", action="store_true", help="shard the model over the processes of torchrun")
    group.add_argument("--seed", type=int, default=0, help="seed for the order of the data (default 0)")
    group.add_argument(
        "--deterministic", action="store_true", help="use deterministic algorithms on GPUs too"
    )


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default cpu")
    parser.add_argument("--log-steps", type=int, default=10, metavar="N", help="default 10")
    parser.add_argument(
        "--eval-steps",
        type=int,
        default=0,
        metavar="N",
        help="steps between evaluations (default: before and after training only)",
    )
    parser.add_argument("--save-steps", type=int, default=500, metavar="N", help="default 500")
    parser.add_argument("--eval-batch-size", type=int, default=8, metavar="N", help="default 8")
    parser.add_argument("--no-tensorboard", action="store_true", help="no metrics for TensorBoard")
    parser.add_argument(
        "--keep-work",
        action="store_true",
        help="keep checkpoints and token files in OUT.finetune, where TensorBoard's files always stay",
    )
    parser.add_argument("--restart", action="store_true", help="discard an interrupted run")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT at the end if it exists")
    parser.add_argument("--json", action="store_true", help="print the report, with every entry, as JSON")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def _run(args: argparse.Namespace) -> int:
    from littlebit2.quantize import load_importance  # noqa: PLC0415  # imports torch
    from littlebit2.train.recipe import finetune  # noqa: PLC0415  # imports torch and transformers

    sizes = (args.bpw, args.ranks, args.paths, args.energy, args.importance)
    sized = any(size is not None for size in sizes) or args.budget != "uniform"
    if args.start is not None and (sized or args.method != "auto"):
        raise SettingError(
            "--start must be given without --bpw, --ranks, --paths, --energy, --budget, --importance and "
            "--method: it has its layers"
        )
    if args.quant_seed < 0:
        raise SettingError(f"--quant-seed must be at least 0, got {args.quant_seed}")
    settings = {"energy": args.energy, "budget": args.budget, **method_options(args)}
    config = None if args.start is not None else quant_config(args, seed=args.quant_seed, **settings)
    report = finetune(
        args.teacher,
        args.out,
        args.data,
        config,
        start=args.start,
        recipe=_recipe(args),
        eval_data=args.eval_data,
        text_field=args.text_field,
        include=args.include,
        importance=None if args.importance is None else load_importance(args.importance),
        device=args.device,
        resume=not args.restart,
        overwrite=args.overwrite,
        exclude=excluded(args),
    )
    if not _leads():
        return 0
    if args.json:
        emit_json(
            {
                "out": str(report.out),
                "steps": report.steps,
                "bpw": report.bpw,
                "perplexity": report.perplexity,
                "agreement": report.agreement,
                "seconds": report.seconds,
                "history": report.history,
            }
        )
        return 0
    figures = f"{report.bpw:.3f} counted bits per weight, {report.steps} steps, {report.seconds:.0f} s"
    emit(f"{report.out}: {figures}")
    if report.perplexity:
        emit(table(("model", "perplexity"), [(k, f"{v:.3f}") for k, v in report.perplexity.items()]))
    work = f"{os.path.abspath(args.out)}.finetune"
    if os.path.isdir(work):
        emit(f"{work}: {'everything that training made' if args.keep_work else 'metrics for TensorBoard'}")
    if report.agreement is not None:
        emit(f"packed against trained: logits differ by {report.agreement:.1e} of the largest")
    return 0


def _leads() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _recipe(args: argparse.Namespace) -> Any:
    from littlebit2.train.recipe import Recipe  # noqa: PLC0415  # imports torch and transformers

    hidden = args.hidden_weight
    if hidden is None:
        hidden = 0.0 if args.teacher_top_k is not None else 10.0
    return Recipe(
        block=args.block,
        steps=args.steps,
        epochs=args.epochs,
        batch_size=args.batch_size,
        accumulation=args.accumulate,
        lr=args.lr,
        scale_lr=args.scale_lr,
        dense_lr=args.dense_lr,
        warmup=args.warmup,
        weight_decay=args.weight_decay,
        max_grad_norm=args.max_grad_norm,
        hidden_weight=hidden,
        surrogate=args.surrogate,
        dense=args.dense,
        precision=args.precision,
        teacher_precision=args.teacher_precision,
        teacher_top_k=args.teacher_top_k,
        gradient_checkpointing=args.gradient_checkpointing,
        fsdp=args.fsdp,
        max_tokens=args.max_tokens,
        hold_out=args.hold_out,
        log_steps=args.log_steps,
        eval_steps=args.eval_steps,
        save_steps=args.save_steps,
        eval_batch_size=args.eval_batch_size,
        seed=args.seed,
        deterministic=args.deterministic,
        tensorboard=not args.no_tensorboard,
        keep_work=args.keep_work,
        quiet=args.quiet,
    )
