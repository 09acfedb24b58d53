"""``littlebit2 generate``: run a checkpoint."""

from __future__ import annotations

import argparse
import sys

from .common import Commands, add_command, add_load_options, emit_json, gigabytes, load_options, note


def add_parser(commands: Commands) -> None:
    """Add the subcommand."""
    parser = add_command(
        commands,
        "generate",
        _run,
        summary="continue a prompt with a checkpoint",
        description="Continue a prompt, greedily unless --temperature or --top-p is given. The text goes to "
        "stdout as it comes, figures of speed and memory to stderr. Takes every layout that is read, "
        "dense models included.",
        examples='  littlebit2 generate CKPT "Once upon a time" --max-new-tokens 64\n'
        "  littlebit2 generate CKPT --token-ids 1 306 4658 --json",
    )
    parser.add_argument("checkpoint", metavar="CKPT", help="directory of the checkpoint")
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("prompt", nargs="?", help="text; needs a tokenizer in the checkpoint")
    prompt.add_argument(
        "--token-ids", type=int, nargs="+", metavar="ID", help="the prompt as token ids instead"
    )
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="default 128")
    parser.add_argument("--temperature", type=float, help="sample tokens at this temperature")
    parser.add_argument(
        "--top-p", type=float, help="sample from the likeliest tokens that together have this probability"
    )
    parser.add_argument("--seed", type=int, help="seed for sampling")
    parser.add_argument("--cache", choices=("dynamic", "static"), default="dynamic", help="key/value cache")
    parser.add_argument(
        "--step",
        choices=("eager", "compile", "graph"),
        help="run steps with a static cache and without the model library's loop: as they are, compiled, or "
        "as one CUDA graph (GPU only)",
    )
    parser.add_argument(
        "--ignore-eos",
        action="store_true",
        help="continue to --max-new-tokens past the end-of-text token, for speed tests",
    )
    add_load_options(parser)
    parser.add_argument("--json", action="store_true", help="print text, tokens and figures as JSON")


def _run(args: argparse.Namespace) -> int:
    from dataclasses import asdict  # noqa: PLC0415  # takes a tenth of --help

    from littlebit2 import generate  # noqa: PLC0415  # imports transformers

    result = generate(
        args.checkpoint,
        args.token_ids if args.prompt is None else args.prompt,
        max_new_tokens=args.max_new_tokens,
        stream=None if args.json else _stream,
        do_sample=args.temperature is not None or args.top_p is not None,
        temperature=args.temperature,
        top_p=args.top_p,
        seed=args.seed,
        cache=args.cache,
        step=args.step,
        ignore_eos=args.ignore_eos,
        **load_options(args),
    )
    speed = result.tokens_per_second
    if args.json:
        emit_json({**asdict(result), "tokens_per_second": speed})
        return 0
    sys.stdout.write("\n")
    sys.stdout.flush()
    figures = [
        f"{len(result.token_ids)} tokens",
        f"loaded in {result.load_seconds:.2f} s",
        f"{result.prompt_tokens} prompt tokens in {result.prefill_seconds:.2f} s",
    ]
    if speed is not None:
        figures.append(f"{speed:.2f} tokens/s")
    if result.peak_resident_bytes is not None:
        figures.append(f"peak resident memory {gigabytes(result.peak_resident_bytes)}")
    note(", ".join(figures))
    return 0


def _stream(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
