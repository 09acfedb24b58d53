"""Compiles what calls launch, for GPUs that are not there: ``python -m tests.triton.ahead sm_90 [--all]``.

The launchers run on meta tensors. In place of a launch, Triton compiles the kernel with the very arguments it
was given, for a target that a stand-in driver names. Its own process, for Triton keeps one driver.
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from benchmarks.markdown import markdown
from littlebit2_kernels.gpu import GPUS, GpuProperties
from littlebit2_kernels.testing import make_packed
from littlebit2_kernels.triton import forward as calls
from littlebit2_kernels.triton import fused, gemm, gemv, operand, plan, transposed, xnor
from littlebit2_kernels.triton.forward import Layer, backward_x, forward
from littlebit2_kernels.triton.plan import DecodeConfig, choose_method
from tests.problems import with_word_layout

#: Target and what calls are planned for, by the name of the machine code.
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), GPUS["A100"]),
    "sm_90": (GPUTarget("cuda", 90, 32), GPUS["H200"]),
    "sm_100": (GPUTarget("cuda", 100, 32), GPUS["B200"]),
    "gfx90a": (GPUTarget("hip", "gfx90a", 64), GpuProperties(90, 104, 65536, 64, "amd")),
    "gfx942": (GPUTarget("hip", "gfx942", 64), GpuProperties(94, 304, 65536, 64, "amd")),
}


#: Layers for which one launch is planned, or nearly, and their ranks.
SMALL_LAYERS: dict[tuple[int, int], tuple[int, ...]] = {
    (384, 1536): (80, 80),
    (768, 768): (24,),
    (1000, 1000): (32, 16),
    (2048, 2048): (8, 8, 8, 8),
    (2048, 8192): (16,),
}


class StandInDriver:
    """What compiling asks a driver for."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def is_active(self) -> bool:
        return True


class Compiler:
    """Stands in for ``wrap_triton``: compiles instead of launching."""

    def __init__(self) -> None:
        self.compiled: list[tuple[str, Any]] = []
        self.label = ""

    def __call__(self, kernel: Any) -> Any:
        def launcher(*arguments: Any, **options: Any) -> None:
            result = kernel.warmup(*arguments, grid=(1,), **options)
            name = kernel.fn.__name__.removesuffix("_kernel")
            last = {True: " last", False: " first", None: ""}[options.get("LAST")]
            self.compiled.append((f"{name}{last} {self.label}", result))

        return _Indexable(launcher)


class _Indexable:
    def __init__(self, launcher: Any) -> None:
        self.launcher = launcher

    def __getitem__(self, grid: Any) -> Any:
        return self.launcher


def compile_calls(
    name: str,
    tokens: Sequence[int],
    ranks: Sequence[int] | None,
    activations: Sequence[str],
    gradients: bool = False,
    *,
    shape: tuple[int, int] = (4096, 11008),
    launches: int | None = None,
    note: str = "",
) -> list[tuple[str, Any]]:
    """Everything that calls launch on a shape, and their gradients; ``(label, compiled)``.

    Args:
        name: of the target.
        tokens: the M of the calls.
        ranks: of the paths; ``None`` is a single stage.
        activations: modes of the calls.
        gradients: whether to compile those of 512 tokens too.
        shape: K and N; the default is one of Llama-2-7B.
        launches: of the GEMV of two stages, where they are not what is planned.
        note: end of the labels.
    """
    target, gpu = TARGETS[name]
    triton.runtime.driver.set_active(StandInDriver(target))
    calls.for_device = lambda device: (gpu, None)
    compiler = Compiler()
    planned = plan.decode_config
    if launches is not None:
        plan.decode_config = lambda *_: DecodeConfig(launches)
    for module in (fused, gemv, gemm, operand, transposed, xnor):
        module.wrap_triton = compiler
    # Rows at multiples of 16 bytes, as LittleBitLinear has them on a GPU.
    packed = with_word_layout(make_packed(*shape, ranks, bias=True).to("meta"), "aligned")
    layer = Layer(*(tensors or [] for tensors in packed.operands))
    for activation, count in itertools.product(activations, tokens):
        method = choose_method(count, activation, float32=False)
        compiler.label = f"{method.kind} {count}{note}"
        x = torch.empty(count, shape[0], dtype=torch.float16, device="meta")
        forward(x, layer, packed.bias, x.new_empty(count, shape[1]), method)
    if gradients:
        compiler.label = f"512{note}"
        grad = torch.empty(512, shape[1], dtype=torch.float16, device="meta")
        backward_x(grad, layer, grad.new_empty(512, shape[0]))
    plan.decode_config = planned
    return compiler.compiled


def machine_code(kernel: Any) -> str:
    """The disassembly of a compiled kernel."""
    if "amdgcn" in kernel.asm:
        return str(kernel.asm["amdgcn"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        done = subprocess.run([tool, "--dump-sass", file.name], capture_output=True, text=True, check=True)
    return done.stdout


def summary(label: str, kernel: Any) -> dict[str, Any]:
    """What the tests look at: instructions by their first word, wide loads, local and shared memory, sums."""
    code = machine_code(kernel)
    if "amdgcn" in kernel.asm:
        names = re.findall(r"^\s+([a-z]\w+)", code, re.MULTILINE)
        spilled = sum(int(count) for count in re.findall(r"\.vgpr_spill_count:\s*(\d+)", code))
        wide = any(name.startswith(("global_load_dwordx4", "buffer_load_dwordx4")) for name in names)
    else:
        pattern = r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9]*)"
        names = re.findall(pattern, code, re.MULTILINE)
        spilled = sum(name in ("LDL", "STL") for name in names)
        wide = re.search(r"\b(LDG|LDGSTS)\.\S*128", code) is not None
    return {
        "label": label,
        "counts": Counter(names),
        "spilled": spilled,
        "wide_loads": wide,
        "instructions": len(names),
        # Of the expansion of signs to float16: the bit's mask and the bits of 1.0.
        "expanding": len(re.findall(r"LOP3\.LUT[^\n]*(?:0x80008000|0x3c003c00)", code)),
        "registers": registers(kernel, code),
        "threads": kernel.metadata.num_warps * kernel.metadata.target.warp_size,
        "shared_bytes": kernel.metadata.shared,
        "sums": reductions(kernel.asm["ttgir"]),
    }


def registers(kernel: Any, code: str) -> int:
    """Vector registers of a thread; of AMD's GPUs those that matrix instructions accumulate in, too."""
    if "amdgcn" in kernel.asm:
        return max(int(count) for count in re.findall(r"\.vgpr_count:\s*(\d+)", code))
    # cuobjdump has no other way to tell of them.
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        done = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True)
    return max(int(count) for count in re.findall(r"REG:(\d+)", done.stdout + done.stderr))


def table(name: str, found: Sequence[dict[str, Any]]) -> str:
    """Static counts of kernels, in Markdown."""
    rows = [
        [
            kernel["label"],
            *(str(kernel[key]) for key in ("threads", "registers", "shared_bytes", "instructions")),
        ]
        for kernel in found
    ]
    return markdown([f"{name}, Triton {triton.__version__}", *_COLUMNS], rows)


_COLUMNS = ("threads", "registers", "shared bytes", "instructions")


def reductions(code: str) -> list[str]:
    """The sums of a kernel over an axis, and how threads share it: from that follows their order."""
    layouts = dict(re.findall(r"^(#\w+) = #ttg\.blocked<\{(.*)\}>$", code, re.MULTILINE))
    found = []
    for part in re.split(r'(?="tt\.reduce")', code)[1:]:
        axis = int(re.search(r"axis = (\d)", part)[1])
        shape, layout = re.search(
            r"\}\) : \(tensor<([\dx]+)x[if]\d+, .*?(#(?:blocked|linear)\d*)", part
        ).groups()
        numbers = re.findall(r"(\w+) = \[([\d, ]+)\]", layouts.get(layout, ""))
        own = [f"{name} {values.split(', ')[axis]}" for name, values in numbers if name != "order"]
        found.append(f"axis {axis} of {shape.split('x')[axis]}: {', '.join(own) or 'irregular'}")
    return found


def main(arguments: Sequence[str]) -> None:
    """Print one JSON object for each kernel of a target: a small set, or with ``--all`` everything.

    With ``--table``, print the static counts as a table.
    """
    name = arguments[0]
    if "--all" in arguments:
        compiled = compile_calls(
            name, (1, 16, 512), (512, 512), ("exact", "float16", "int8", "sign"), gradients=True
        )
        for shape, ranks in SMALL_LAYERS.items():
            for launches in (1, 2):
                compiled += compile_calls(
                    name, (1,), ranks, ("exact",), shape=shape, launches=launches, note=f" {shape}"
                )
    else:
        compiled = compile_calls(name, (1,), (512,), ("exact",)) + compile_calls(
            name, (512,), (512,), ("float16",)
        )
        compiled += compile_calls(name, (1,), None, ("sign",))
        compiled += compile_calls(name, (1,), (80, 80), ("exact",), shape=(4096, 4096), note=" rank 80")
        compiled += compile_calls(name, (1,), (32, 32), ("exact",), shape=(1024, 1024), note=" rank 32")
        compiled += compile_calls(
            name, (1,), (32, 32), ("exact",), shape=(1024, 1024), launches=2, note=" rank 32"
        )
        compiled += compile_calls(name, (512,), None, ("int8",), gradients=True)
    found = [summary(label, kernel) for label, kernel in compiled]
    print(table(name, found) if "--table" in arguments else "\n".join(map(json.dumps, found)))


if __name__ == "__main__":
    main(sys.argv[1:])
