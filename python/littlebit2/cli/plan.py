"""``littlebit2 plan``: what a model would weigh."""

from __future__ import annotations

import argparse
import os
import re
from dataclasses import replace
from typing import TYPE_CHECKING

from littlebit2._messages import SettingError

from .blockwise import blockwise_config, is_blockwise
from .common import (
    Commands,
    add_command,
    at_largest_rank,
    emit,
    emit_json,
    excluded,
    gigabytes,
    method_options,
    note,
    quant_config,
    rows_options,
    table,
)
from .quantize import add_quantize_options, add_run_options

if TYPE_CHECKING:
    from littlebit2.plan import LayerPlan, ModelPlan
    from littlebit2.quantize import QuantConfig
    from littlebit2.quantize.allocate import RankAllocation

_DESCRIPTION = """\
Ranks and sizes of a model at a number of bits per weight, from its config.json, and from the headers of its
weights where they are there: nothing is downloaded, and weights are read only for --budget spectral and
--energy, which need the directory of the model. What is packed is decided as quantize does.
Shipped configurations: llama-2-7b, llama-2-13b, llama-2-70b, llama-3-8b, qwen3-8b.
"""

_EXAMPLES = """\
  littlebit2 plan llama-2-13b --bpw 0.1
  littlebit2 plan MODEL_DIR --bpw 0.55 --kv-factor 2 --json
  littlebit2 plan MODEL_DIR --bpw 0.55 --budget spectral    ranks by the weights' spectra, errors to expect
"""


def add_parser(commands: Commands) -> None:
    """Add the subcommand."""
    parser = add_command(
        commands,
        "plan",
        _run,
        summary="ranks and sizes from a config.json alone",
        description=_DESCRIPTION,
        examples=_EXAMPLES,
    )
    parser.add_argument(
        "config", metavar="CONFIG_OR_NAME", help="a config.json, a directory with one, or a shipped name"
    )
    parser.add_argument("out", metavar="OUT", nargs="?", help="as of quantize, without effect on a plan")
    add_quantize_options(parser)
    add_run_options(parser.add_argument_group("as of quantize, without effect on a plan"))
    parser.add_argument("--json", action="store_true", help="print every layer and all sizes as JSON")


def _run(args: argparse.Namespace) -> int:
    from littlebit2.plan import plan_model  # noqa: PLC0415  # imports torch

    if is_blockwise(args):
        config = blockwise_config(args)
        if config.budget == "kl":
            note(
                "--budget kl: quantize measures the ranks; these are uniform, and all bits together the same"
            )
            config = replace(config, budget="uniform")
    else:
        config = quant_config(
            args, energy=args.energy, budget=args.budget, seed=args.seed, **method_options(args)
        )
    exclude = excluded(args)
    plan = plan_model(
        args.config,
        config,
        include=args.include,
        exclude=exclude,
        **rows_options(args),
        allocation=_allocation(args, config, exclude),
    )
    if args.json:
        emit_json(
            {
                "model_type": plan.shapes.model_type,
                "counted_bpw": plan.counted_bpw,
                "stored_bpw": plan.stored_bpw,
                "bytes": plan.bytes(),
                "tied_head": plan.shapes.tied_head,
                "int8": dict(plan.int8),
                "left_dense": [shape.name for shape in plan.left_dense],
                "reasons": {reason: list(names) for reason, names in plan.reasons.items()},
                "notes": list(plan.notes),
                "layers": [layer.as_dict() for layer in plan.layers],
            }
        )
        return 0
    emit(_layer_table(plan.layers, "weighted error" if args.importance else "squared error"))
    full = at_largest_rank([layer.name for layer in plan.layers if layer.at_largest_rank], args)
    if full is not None:
        emit(full)
    if plan.reasons:
        emit()
        emit(table(("left dense", "count", "for example"), _reason_rows(plan)))
    for remark in plan.notes:
        emit(remark)
    emit()
    emit(_size_table(plan))
    return 0


def _allocation(
    args: argparse.Namespace, config: QuantConfig, exclude: list[str]
) -> dict[str, RankAllocation] | None:
    from littlebit2.offline import measure_ranks  # noqa: PLC0415  # imports torch
    from littlebit2.quantize import load_importance  # noqa: PLC0415  # imports torch
    from littlebit2.quantize.ranks import needs_spectra  # noqa: PLC0415  # imports torch

    importance = None if args.importance is None else load_importance(args.importance)
    if not needs_spectra(config):
        if importance is not None:
            note("--importance changes a plan only with --budget spectral or --energy")
        return None
    if not os.path.isdir(args.config):
        raise SettingError(
            f"--budget spectral and --energy need the directory of a model, with weights, got {args.config}"
        )
    return measure_ranks(
        args.config,
        config,
        include=args.include,
        exclude=exclude,
        importance=importance,
        progress=not args.quiet,
    )


def _layer_table(layers: tuple[LayerPlan, ...], kind: str) -> str:
    """One row for all layers that differ only in numbers of their names; ``kind`` of the predicted errors."""
    groups: dict[tuple[str, int, int, tuple[int, ...]], list[LayerPlan]] = {}
    for layer in layers:
        pattern = re.sub(r"\.\d+(?=\.|$)", ".*", layer.name)
        # Ranks by spectra differ from layer to layer: there every layer has its own row.
        name = pattern if layer.predicted_error is None else layer.name
        groups.setdefault((name, layer.out_features, layer.in_features, layer.ranks), []).append(layer)
    by_spectra = any(layer.predicted_error is not None for layer in layers)
    rows = []
    for (pattern, n, k, _), members in groups.items():
        one = members[0]
        ranks = "+".join(map(str, one.ranks))
        error = [f"{one.predicted_error:.4f}"] if one.predicted_error is not None else []
        bits = (f"{one.counted_bpw:.4f}", f"{one.stored_bpw:.4f}")
        rows.append((pattern, len(members), f"{n} x {k}", ranks, *bits, *error))
    head = ("layers", "count", "N x K", "ranks", "counted bpw", "stored bpw")
    return table((*head, f"predicted {kind}") if by_spectra else head, rows)


def _reason_rows(plan: ModelPlan) -> list[tuple[object, ...]]:
    return [
        (reason, len(names), names[0] + (", ..." if len(names) > 1 else ""))
        for reason, names in sorted(plan.reasons.items(), key=lambda item: -len(item[1]))
    ]


def _size_table(plan: ModelPlan) -> str:
    size = plan.bytes()
    bits = {name: "int8" if name in plan.int8 else "16 bit" for name in ("embeddings", "heads")}
    head = "head: tied to the embedding" if plan.shapes.tied_head else f"head, {bits['heads']}"
    rows: list[tuple[str, str]] = [
        ("packed layers: sign words, rows padded to 32 bits", gigabytes(size["words"])),
        ("packed layers: scales, fp32 as loaded", gigabytes(size["scales_fp32"])),
        (f"embeddings, {bits['embeddings']}", gigabytes(size["embeddings"])),
        (head, gigabytes(size["heads"])),
        ("norms and biases, 16 bit", gigabytes(size["norms"] + size["biases"])),
    ]
    if size["other_matrices"]:
        rows.append(("other matrices left dense, 16 bit", gigabytes(size["other_matrices"])))
    ratio = size["model_fp16"] / size["total"]
    rows += [
        ("TOTAL in memory", gigabytes(size["total"])),
        (f"  the dense model, 16 bit ({ratio:.1f} times as much)", gigabytes(size["model_fp16"])),
        ("  total with fp16 scales", gigabytes(size["total_fp16_scales"])),
        ("  total with layers as the papers count bits", gigabytes(size["total_counted"])),
        ("  total without embeddings and head", gigabytes(size["total_without_embeddings"])),
    ]
    return table((f"{len(plan.layers)} layers at {plan.counted_bpw:.4f} counted bpw", "size"), rows)
