"""``littlebit2 generate``: run a checkpoint."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from littlebit2._messages import SettingError

from .common import (
    Commands,
    add_command,
    add_load_options,
    emit,
    emit_json,
    gigabytes,
    load_options,
    note,
)

#: Options that make tokens drawn.
_DRAWN = ("temperature", "top_k", "top_p")


def add_parser(commands: Commands) -> None:
    """Add the subcommand."""
    parser = add_command(
        commands,
        "generate",
        _run,
        summary="continue prompts with a checkpoint",
        description="Continue a prompt, greedily unless --sample, --temperature, --top-k or --top-p is "
        "given. The text goes to stdout as it comes, figures of speed and memory to stderr. Several prompts "
        "are continued together, and printed when all are done. Takes every layout that is read, dense "
        "models included.",
        examples='  littlebit2 generate CKPT "Once upon a time" --max-new-tokens 64\n'
        '  littlebit2 generate CKPT --chat --system "Answer briefly." "Why is the sky blue?"\n'
        "  littlebit2 generate CKPT --prompts-file prompts.txt --json\n"
        "  littlebit2 generate CKPT --token-ids 1 306 4658 --explain",
    )
    parser.add_argument("checkpoint", metavar="CKPT", help="directory of the checkpoint")
    parser.add_argument(
        "prompt", nargs="*", metavar="PROMPT", help="text; needs a tokenizer in the checkpoint"
    )
    parser.add_argument("--prompts-file", metavar="FILE", help="a prompt a line; - for stdin")
    parser.add_argument(
        "--token-ids", type=int, nargs="+", metavar="ID", help="one prompt as token ids instead"
    )
    parser.add_argument(
        "--batch-size", type=int, default=8, metavar="N", help="prompts at a time (default 8)"
    )
    parser.add_argument(
        "--chat",
        action="store_true",
        help="prompts are what a user says, for the tokenizer's chat template",
    )
    parser.add_argument("--system", metavar="TEXT", help="what the system says first; implies --chat")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="default 128")
    parser.add_argument("--sample", action="store_true", help="draw tokens instead of taking the likeliest")
    parser.add_argument("--temperature", type=float, metavar="T", help="sample tokens at this temperature")
    parser.add_argument("--top-k", type=int, metavar="K", help="sample from the K likeliest tokens (0: all)")
    parser.add_argument(
        "--top-p",
        type=float,
        metavar="P",
        help="sample from the likeliest tokens that together have this probability",
    )
    parser.add_argument(
        "--repetition-penalty", type=float, metavar="X", help="divide scores of tokens that were there by X"
    )
    parser.add_argument("--seed", type=int, help="seed for sampling")
    parser.add_argument(
        "--cache", choices=("dynamic", "static"), help="key/value cache (default: the faster one)"
    )
    parser.add_argument(
        "--step",
        choices=("library", "eager", "compile", "graph"),
        help="how a step runs: in the model library's loop, or in ours as it is, compiled, or as one CUDA "
        "graph (default: the fastest that is sure to be right; --explain tells)",
    )
    parser.add_argument(
        "--explain", action="store_true", help="say how tokens were decoded, why, and what else there is"
    )
    parser.add_argument(
        "--ignore-eos",
        action="store_true",
        help="continue to --max-new-tokens past the end-of-text token, for speed tests",
    )
    add_load_options(parser)
    parser.add_argument("--json", action="store_true", help="print text, tokens and figures as JSON")
    # Prompts may come after options too.
    parser.set_defaults(takes_more="prompt")


def _run(args: argparse.Namespace) -> int:
    prompts = _prompts(args)
    sampling = {name: getattr(args, name) for name in (*_DRAWN, "repetition_penalty")}
    sampling["do_sample"] = args.sample or any(sampling[name] is not None for name in _DRAWN)
    one = len(prompts) == 1
    settings: dict[str, Any] = {
        "max_new_tokens": args.max_new_tokens,
        "chat": args.chat,
        "system": args.system,
        "seed": args.seed,
        "cache": args.cache,
        "step": args.step,
        "ignore_eos": args.ignore_eos,
        **sampling,
    }
    from littlebit2 import generate, generate_batch  # noqa: PLC0415  # imports transformers

    settings |= load_options(args)
    if one:
        stream = None if args.json else _stream
        results = [generate(args.checkpoint, prompts[0], stream=stream, **settings)]
    else:
        results = generate_batch(args.checkpoint, prompts, batch_size=args.batch_size, **settings)
    if args.json:
        from dataclasses import asdict  # noqa: PLC0415  # a tenth of what --help takes

        made = [{**asdict(result), "tokens_per_second": result.tokens_per_second} for result in results]
        emit_json(made[0] if one else made)
    elif one:
        sys.stdout.write("\n")
        sys.stdout.flush()
    else:
        for prompt, result in zip(prompts, results, strict=True):
            emit(f"> {prompt}")
            emit(result.text if result.text is not None else " ".join(map(str, result.token_ids)))
            emit()
    if args.explain:
        note(str(results[0].way))
    if not args.json:
        cut = [result for result in results if result.out_of_positions]
        if cut:
            of_all = f"{len(cut)} of {len(results)} texts " if len(results) > 1 else ""
            note(f"{of_all}stopped before --max-new-tokens: the model has no more positions")
        note(_figures(results, args.batch_size))
    return 0


def _prompts(args: argparse.Namespace) -> list[Any]:
    given = [bool(args.prompt), args.prompts_file is not None, args.token_ids is not None]
    if sum(given) != 1:
        args.parser.error(f"one of PROMPT, --prompts-file and --token-ids is needed, got {sum(given)}")
    if args.batch_size < 1:
        raise SettingError(f"batch_size must be at least 1, got {args.batch_size}")
    if args.token_ids is not None:
        if args.chat or args.system is not None:
            raise SettingError("--chat and --system need text, got --token-ids")
        return [args.token_ids]
    if args.prompt:
        return list(args.prompt)
    if args.prompts_file == "-":
        text = sys.stdin.read()
    else:
        with open(args.prompts_file, encoding="utf-8") as file:
            text = file.read()
    prompts = [line for line in text.splitlines() if line.strip()]
    if not prompts:
        raise SettingError(f"--prompts-file must hold at least one prompt, got none in {args.prompts_file}")
    return prompts


def _figures(results: Sequence[Any], batch_size: int) -> str:
    first = results[0]
    tokens = sum(len(result.token_ids) for result in results)
    # The times of a batch are those of each of its results.
    batches = results[::batch_size]
    prefill, decode = (
        sum(getattr(one, name) for one in batches) for name in ("prefill_seconds", "decode_seconds")
    )
    prompt_tokens = sum(result.prompt_tokens for result in results)
    figures = [
        f"{tokens} tokens" + (f" for {len(results)} prompts" if len(results) > 1 else ""),
        f"loaded in {first.load_seconds:.2f} s",
        f"{prompt_tokens} prompt tokens in {prefill:.2f} s",
    ]
    later = tokens - len(results)
    if later > 0 and decode > 0:
        figures.append(f"{later / decode:.2f} tokens/s")
    if first.peak_resident_bytes is not None:
        figures.append(f"peak resident memory {gigabytes(first.peak_resident_bytes)}")
    return ", ".join(figures)


def _stream(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
