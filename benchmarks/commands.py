"""The command table of ``python -m benchmarks``.

A command is a module with ``add_arguments(parser)`` and ``run(options) -> int`` (the exit status); its
docstring is the text of ``--help``. At its top it imports nothing that takes long (torch, transformers),
so that help and usage errors come at once.
"""

from __future__ import annotations

import argparse
import importlib
from dataclasses import dataclass
from typing import Any

__all__ = ["COMMANDS", "Command", "command_parser", "overview_parser"]


@dataclass(frozen=True)
class Command:
    """One row of the table.

    Attributes:
        group: heading under which ``--help`` lists it.
        module: name inside ``benchmarks``.
        help: one line.
    """

    group: str
    module: str
    help: str

    def load(self) -> Any:
        """Import the command's module."""
        return importlib.import_module(f"benchmarks.{self.module}")


COMMANDS = {
    "sweep": Command("layers", "layers.sweep", "time candidates x shapes x bpw x tokens x dtypes"),
    "goals": Command("layers", "layers.goals", "compare the CPU kernels with their goals"),
    "floors": Command(
        "layers", "layers.floors", "measure the machine: memory read and copy, matrix products"
    ),
    "overhead": Command("layers", "layers.overhead", "time tiny calls, imports and model loading"),
    "tune-triton": Command("layers", "layers.tune_triton", "tune the Triton kernels on a GPU"),
    "whole-model": Command("models", "models.whole_model", "time decode of a random Llama, packed and dense"),
    "attention": Command("models", "models.attention", "time attention of one query on the CPU, by context"),
    "experts": Command(
        "models", "models.experts", "time one layer of experts, packed and dense, by routed experts"
    ),
    "load-memory": Command(
        "models", "models.load_memory", "measure what loading a mixture of experts takes, beside its files"
    ),
    "startup": Command(
        "models", "models.startup", "time interpreter starts with and without the hook for transformers"
    ),
    "serving": Command(
        "models", "models.serving", "measure the throughput of vLLM, packed and dense, by batch size"
    ),
    "demo": Command("quality", "quality.demo", "quantize a small real model and time one layer"),
    "quantizer": Command(
        "quality", "quality.quantizer", "measure error and time of each quantization method"
    ),
    "finetune": Command("quality", "quality.finetune", "measure what training adds to each initialization"),
    "blockwise": Command(
        "quality", "quality.blockwise", "measure each stage of block-by-block quantization on SmolLM2-135M"
    ),
    "block-cost": Command(
        "quality", "quality.block_cost", "state hours and memory of quantizing a large model block by block"
    ),
    "int8-rows": Command(
        "quality", "quality.int8_rows", "measure what int8 embeddings and heads do to SmolLM2-135M"
    ),
    "families": Command(
        "quality", "quality.family_sweep", "try every model family of transformers at a tiny size"
    ),
    "predict": Command("estimates", "estimates.predict", "predict GPU times from counts, without a GPU"),
    "launches": Command(
        "estimates", "estimates.layer_launches", "count the launches of a decoder layer on CUDA, by part"
    ),
    "sass-path": Command(
        "estimates", "sass.sass_path", "count the cycles of a decode kernel's machine code, by phase"
    ),
    "arm-cycles": Command(
        "estimates", "estimates.arm_cycles", "count the cycles of the NEON kernels' inner loops with llvm-mca"
    ),
    "kernel-report": Command("cuda", "cuda.kernel_report", "list registers and spills of each CUDA kernel"),
    "gpu-suite": Command("cuda", "cuda.gpu_suite", "build, test and measure everything on a GPU machine"),
    "table": Command("results", "table", "print a sweep or goals JSON as a markdown table"),
    "plot": Command("results", "plots", "plot a sweep, goals or whole-model JSON as PNG files"),
}


def overview_parser() -> argparse.ArgumentParser:
    """The parser of ``python -m benchmarks`` without a known command: prints the table, or a usage error."""
    width = max(map(len, COMMANDS))
    lines = ["commands:"]
    for group in dict.fromkeys(command.group for command in COMMANDS.values()):
        lines.append(f"  {group}")
        lines += [f"    {name:<{width}}  {c.help}" for name, c in COMMANDS.items() if c.group == group]
    lines += [
        "",
        "`python -m benchmarks COMMAND --help` describes a command.",
        "Pin threads when measuring on a CPU: OMP_PROC_BIND=true OMP_PLACES=threads.",
    ]
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure packed layers and models beside their peers, on one machine, in one run.",
        epilog="\n".join(lines),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of the commands below")
    return parser


def command_parser(name: str) -> argparse.ArgumentParser:
    """The parser of one command; its namespace holds ``command`` and ``run`` besides the options."""
    module = COMMANDS[name].load()
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks {name}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    parser.set_defaults(command=name, run=module.run)
    return parser
