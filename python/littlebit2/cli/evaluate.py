"""``littlebit2 evaluate``: perplexity and tasks of a checkpoint."""

from __future__ import annotations

import argparse

from .common import Commands, add_command, add_load_options, emit, emit_json, load_options, table

_DESCRIPTION = """\
Measure a checkpoint, packed or dense: its perplexity on text, how often it agrees with the dense model it
was made from, and, where lm-evaluation-harness is installed, its tasks. Packed layers run on the packed
kernels.
"""

_EXAMPLES = """\
  littlebit2 evaluate CKPT --data held_out.txt
  littlebit2 evaluate CKPT --data wiki.parquet --block 2048 --stride 512 --json
  littlebit2 evaluate CKPT --data held_out.txt --teacher DENSE
  littlebit2 evaluate CKPT --tasks arc_easy hellaswag --limit 200
"""


def add_parser(commands: Commands) -> None:
    """Add the subcommand."""
    parser = add_command(
        commands,
        "evaluate",
        _run,
        summary="perplexity on text, tasks of lm-evaluation-harness",
        description=_DESCRIPTION,
        examples=_EXAMPLES,
    )
    parser.add_argument("model", metavar="MODEL", help="directory of the checkpoint, with a tokenizer")
    parser.add_argument(
        "--data", nargs="+", metavar="PATH", help="text: .txt, .jsonl, .parquet, ..., or directories"
    )
    parser.add_argument(
        "--text-field",
        default="text",
        help="field that holds the text in JSON lines and tables (default text)",
    )
    parser.add_argument("--max-tokens", type=int, metavar="N", help="read at most N tokens")
    parser.add_argument(
        "--block", type=int, metavar="T", help="tokens of context (default 2048, or what the model takes)"
    )
    parser.add_argument(
        "--stride",
        type=int,
        metavar="S",
        help="begin a block every S tokens and count only its new ones: each has T - S or more tokens of "
        "context (default T: blocks do not overlap)",
    )
    parser.add_argument(
        "--teacher",
        metavar="DENSE",
        help="compare with this checkpoint: ratio of the perplexities, KL of the predictions, and how often "
        "the likeliest token is the same",
    )
    parser.add_argument("--batch-size", type=int, default=8, metavar="N", help="blocks per batch (default 8)")
    parser.add_argument(
        "--tasks", nargs="+", default=[], metavar="TASK", help="tasks of lm-evaluation-harness"
    )
    parser.add_argument(
        "--include-path", metavar="FOLDER", help="further tasks, described in YAML as the harness wants them"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="examples per task")
    add_load_options(parser)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")


def _run(args: argparse.Namespace) -> int:
    from littlebit2.train.recipe import evaluate_model  # noqa: PLC0415  # imports torch and transformers

    found = evaluate_model(
        args.model,
        args.data,
        teacher=args.teacher,
        block=args.block,
        stride=args.stride,
        text_field=args.text_field,
        max_tokens=args.max_tokens,
        batch_size=args.batch_size,
        tasks=args.tasks,
        include_path=args.include_path,
        limit=args.limit,
        **load_options(args),
    )
    measured, compared = found.perplexity, found.agreement
    if args.json:
        text: dict[str, float] | None = None
        if measured is not None:
            text = {
                "perplexity": measured.value,
                "nll": measured.nll,
                "tokens": measured.tokens,
                "block": found.block,
                "stride": found.stride,
            }
        if text is not None and compared is not None and found.ratio is not None:
            text |= {
                "kl": compared.kl,
                "top1": compared.top1,
                "teacher_perplexity": compared.teacher.value,
                "perplexity_ratio": found.ratio,
            }
        emit_json({"text": text, "tasks": found.tasks})
        return 0
    if measured is not None:
        emit(
            f"perplexity {measured.value:.4f} ({measured.nll:.4f} nats a token, {measured.tokens} tokens in "
            f"blocks of {found.block}" + (f" every {found.stride})" if found.stride < found.block else ")")
        )
    if compared is not None:
        emit(
            f"teacher {compared.teacher.value:.4f}, ratio of perplexities {found.ratio:.4f}; "
            f"KL {compared.kl:.4f} nats a token, likeliest token the same for {compared.top1:.2%}"
        )
    rows = [
        (task, metric, f"{value:.4f}")
        for task, values in found.tasks.items()
        for metric, value in values.items()
        if isinstance(value, float)
    ]
    if rows:
        emit(table(("task", "metric", "value"), rows))
    return 0
