"""``littlebit2 inspect``: what is in a checkpoint."""

from __future__ import annotations

import argparse
import re
from typing import Any

from .common import FAILED, Commands, add_command, emit, emit_json, gigabytes, table

_VERDICTS = {
    True: "its checksum is right",
    False: "DAMAGED: its checksum is not that of what is in it; copy or make the checkpoint again",
    None: "has no checksum to compare it with (littlebit2 writes them; convert writes one with it)",
}


def add_parser(commands: Commands) -> None:
    """Add the subcommand."""
    parser = add_command(
        commands,
        "inspect",
        _run,
        summary="layers, ranks, bits per weight, sizes and problems of a checkpoint",
        description="Say what a checkpoint of any known layout holds, from its headers alone: packed layers "
        "with their ranks, counted and stored bits per weight, sizes, and whatever is odd about it.",
        examples="  littlebit2 inspect CHECKPOINT\n  littlebit2 inspect CHECKPOINT --json\n"
        "  littlebit2 inspect CHECKPOINT --verify",
    )
    parser.add_argument("path", metavar="PATH", help="directory of the checkpoint")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.add_argument(
        "--verify",
        action="store_true",
        help="read every file of weights and compare it with its checksum; exit code 1 if one differs",
    )


def _run(args: argparse.Namespace) -> int:
    from littlebit2.checkpoint import describe, open_checkpoint  # noqa: PLC0415  # imports torch

    with open_checkpoint(args.path) as checkpoint:
        found = describe(checkpoint)
        verified = checkpoint.verify() if args.verify else {}
    code = FAILED if False in verified.values() else 0
    if args.json:
        emit_json({**found, "verified": verified} if args.verify else found)
        return code
    totals = found["totals"]
    emit(f"{found['path']}: format {found['format']}, model type {found['model_type'] or 'unknown'}")
    if found["layers"]:
        emit()
        emit(_layer_table(found["layers"]))
        emit()
        emit(
            f"{totals['layers']} packed layers of {totals['packed_weights']} weights: counted "
            f"{totals['counted_bpw']:.4f} bpw, stored {totals['stored_bpw']:.4f} bpw"
        )
    size = totals["bytes"]
    parts = ("packed", "scales", "salient", "bias", "other", "int8", "dense", "all")
    emit(", ".join(f"{part} {gigabytes(size[part])}" for part in parts if part != "salient" or size[part]))
    for name, source in found["tied"].items():
        emit(f"tied: {name} is {source}")
    if found["metadata"]:
        emit("settings: " + ", ".join(f"{name} = {value}" for name, value in found["metadata"].items()))
    for problem in found["problems"]:
        emit(f"note: {problem}")
    for file, same in verified.items():
        emit(f"{file}: {_VERDICTS[same]}")
    return code


def _layer_table(layers: dict[str, dict[str, Any]]) -> str:
    groups: dict[tuple[object, ...], list[dict[str, Any]]] = {}
    for name, layer in layers.items():
        pattern = re.sub(r"\.\d+(?=\.|$)", ".*", name)
        ranks = "single stage" if layer["ranks"] is None else "+".join(map(str, layer["ranks"]))
        if layer["salient_columns"]:
            ranks += f" and {layer['salient_columns']} columns"
        key = (pattern, layer["out_features"], layer["in_features"], ranks, layer["bias"])
        groups.setdefault(key, []).append(layer)
    rows = [
        (
            pattern,
            len(members),
            f"{n} x {k}",
            ranks,
            "yes" if bias else "no",
            f"{members[0]['counted_bpw']:.4f}",
            f"{members[0]['stored_bpw']:.4f}",
        )
        for (pattern, n, k, ranks, bias), members in groups.items()
    ]
    return table(("layers", "count", "N x K", "ranks", "bias", "counted bpw", "stored bpw"), rows)
