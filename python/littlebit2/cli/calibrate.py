"""``littlebit2 calibrate``: activations of a model on text."""

from __future__ import annotations

import argparse

from .common import Commands, add_command, emit, note

_DESCRIPTION = """\
Run a dense checkpoint on local text and write, for the inputs of every linear layer, the mean squares by
which "littlebit2 quantize --importance FILE" weighs errors. Text is streamed; nothing is downloaded.
"""

_EXAMPLES = """\
  littlebit2 calibrate MODEL_DIR --data corpus.txt --out importance.safetensors
  littlebit2 calibrate MODEL_DIR --data c4.jsonl.gz --gradients --out importance.safetensors
  littlebit2 quantize MODEL_DIR OUT --bpw 0.55 --budget spectral --importance importance.safetensors
"""


def add_parser(commands: Commands) -> None:
    """Add the subcommand."""
    parser = add_command(
        commands,
        "calibrate",
        _run,
        summary="activations of a model on text, for quantize --importance",
        description=_DESCRIPTION,
        examples=_EXAMPLES,
    )
    parser.add_argument(
        "model_dir", metavar="MODEL_DIR", help="directory of the dense checkpoint, with a tokenizer"
    )
    parser.add_argument(
        "--data",
        nargs="+",
        required=True,
        metavar="PATH",
        help="text: .txt, .md, .jsonl (also .gz), .parquet, ..., or directories",
    )
    parser.add_argument("--out", required=True, metavar="FILE", help="safetensors file to write")
    parser.add_argument(
        "--tokens", type=int, default=65536, metavar="N", help="maximum tokens to run (default 65536)"
    )
    parser.add_argument(
        "--block", type=int, metavar="T", help="tokens per sequence (default 512, or the model's maximum)"
    )
    parser.add_argument(
        "--gradients",
        action="store_true",
        help="also measure what each layer's outputs are worth to the loss, for --budget spectral",
    )
    parser.add_argument(
        "--text-field",
        default="text",
        help="field that holds the text in JSON lines and tables (default text)",
    )
    parser.add_argument("--device", default="cpu", help="device to run on (default cpu)")
    parser.add_argument("--dtype", help="dtype of the model: float32, bfloat16, float16 (default: as stored)")
    parser.add_argument("--overwrite", action="store_true", help="replace FILE at the end if it exists")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def _run(args: argparse.Namespace) -> int:
    from littlebit2.calibrate import calibrate  # noqa: PLC0415  # imports torch

    done = calibrate(
        args.model_dir,
        args.data,
        args.out,
        tokens=args.tokens,
        block=args.block,
        gradients=args.gradients,
        text_field=args.text_field,
        device=args.device,
        dtype=args.dtype,
        progress=not args.quiet,
        overwrite=args.overwrite,
    )
    emit(f"{args.out}: {len(done.layers)} layers, {done.tokens} tokens, {done.seconds:.1f} s")
    if done.missing:
        note(f"no token reached {len(done.missing)} layers, such as {done.missing[0]}: they weigh all alike")
    return 0
