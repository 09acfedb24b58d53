"""The rows of CONTRIBUTING.md's module table hold for the tree, and each of them can fail."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.project import import_rules
from tests.project.import_rules import Finding

ROOT = Path(__file__).parents[2]

CHECKS = {
    "python": import_rules.python_findings,
    "include": import_rules.include_findings,
    "getenv": import_rules.getenv_findings,
    "length": import_rules.length_findings,
    "text": import_rules.text_findings,
}


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
def test_tree_follows_the_rules(check: Callable[[Path], list[Finding]]) -> None:
    findings = check(ROOT)
    assert not findings, "\n" + "\n".join(map(str, findings))


def test_scan_sees_the_tree() -> None:
    seen = {path.relative_to(ROOT).as_posix() for path in import_rules.source_files(ROOT)}
    assert {
        "pyproject.toml",
        ".ci/run",
        "littlebit2_kernels/format.py",
        "csrc/include/littlebit2/format.h",
        "tests/project/test_import_rules.py",
    } <= seen
    assert ROOT / "csrc/include/littlebit2/format.h" in import_rules.cxx_files(ROOT)


def plant(root: Path, path: str, text: str) -> Path:
    target = root / path
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text, "utf-8")
    return target


PYTHON_OFFENDERS = {
    "version-imports-torch": ("littlebit2_kernels/version.py", "import torch", "must not refer to torch"),
    "format-imports-native": (
        "littlebit2_kernels/format.py",
        "from . import _native",
        "must not refer to littlebit2_kernels._native",
    ),
    "format-imports-native-lazily": (
        "littlebit2_kernels/format.py",
        "def f():\n    from ._native import load",
        "must not refer to littlebit2_kernels._native.load",
    ),
    "format-imports-by-name": (
        "littlebit2_kernels/format.py",
        "import importlib\nimportlib.import_module('triton')",
        "must not refer to triton",
    ),
    "format-uses-ctypes": ("littlebit2_kernels/format.py", "import ctypes", "must not refer to ctypes"),
    "reference-imports-triton": ("littlebit2_kernels/reference.py", "import triton", "refer to triton"),
    "reference-calls-the-op": (
        "littlebit2_kernels/reference.py",
        "import torch as t\ny = t.ops.littlebit2.linear(1)",
        "must not refer to torch.ops.littlebit2.linear",
    ),
    "testing-imports-ops": (
        "littlebit2_kernels/testing.py",
        "from .ops import f",
        "littlebit2_kernels.ops.f",
    ),
    "packing-imports-ops": ("littlebit2_kernels/packing.py", "from . import ops", "littlebit2_kernels.ops"),
    "linear-imports-native": (
        "littlebit2_kernels/linear.py",
        "import littlebit2_kernels._native as n",
        "must not refer to littlebit2_kernels._native",
    ),
    "linear-imports-packing": (
        "littlebit2_kernels/linear.py",
        "from .packing import pack_signs",
        "must not refer to littlebit2_kernels.packing.pack_signs",
    ),
    "triton-imports-native": (
        "littlebit2_kernels/triton/launch.py",
        "from .. import _native",
        "must not refer to littlebit2_kernels._native",
    ),
    "ops-imports-triton-eagerly": (
        "littlebit2_kernels/ops/calls.py",
        "from ..triton import launch",
        "may import littlebit2_kernels.triton.launch only inside a function",
    ),
    "package-imports-triton-eagerly": (
        "littlebit2_kernels/__init__.py",
        "try:\n    import triton\nexcept ImportError:\n    pass",
        "may import triton only inside a function",
    ),
    "kernels-import-the-user-package": (
        "littlebit2_kernels/dispatch.py",
        "def f():\n    import littlebit2.quantize",
        "must not refer to littlebit2.quantize",
    ),
    "kernels-import-third-party": (
        "littlebit2_kernels/dispatch.py",
        "import scipy",
        "must not refer to scipy",
    ),
    "quantize-imports-transformers": (
        "python/littlebit2/quantize/pipeline.py",
        "def f():\n    from transformers import AutoModel",
        "must not refer to transformers.AutoModel",
    ),
    "quantize-imports-kernels": (
        "python/littlebit2/quantize/quantizer.py",
        "from littlebit2_kernels import ops",
        "must not refer to littlebit2_kernels.ops",
    ),
    "quantize-uses-a-private-name": (
        "python/littlebit2/quantize/quantizer.py",
        "import littlebit2_kernels.format as f\nf._check_dim('K', 1)",
        "_check_dim is private",
    ),
    "checkpoint-imports-transformers": (
        "python/littlebit2/checkpoint/reader.py",
        "def f():\n    import transformers",
        "must not refer to transformers",
    ),
    "checkpoint-imports-the-quantizer": (
        "python/littlebit2/checkpoint/specs.py",
        "from littlebit2.quantize import counted_bpw",
        "must not refer to littlebit2.quantize.counted_bpw",
    ),
    "formats-import-the-reader": (
        "python/littlebit2/checkpoint/formats/onebit.py",
        "from littlebit2.checkpoint.reader import open_checkpoint",
        "must not refer to littlebit2.checkpoint.reader.open_checkpoint",
    ),
    "checkpoint-imports-kernels": (
        "python/littlebit2/checkpoint/reader.py",
        "from littlebit2_kernels import LittleBitLinear",
        "must not refer to littlebit2_kernels.LittleBitLinear",
    ),
    "integrations-use-a-private-name": (
        "python/littlebit2/integrations/transformers.py",
        "from littlebit2_kernels._native import load",
        "_native is private",
    ),
    "integrations-use-a-private-attribute": (
        "python/littlebit2/integrations/vllm.py",
        "import littlebit2_kernels\nlittlebit2_kernels.linear._pad",
        "_pad is private",
    ),
    "user-package-imports-transformers-eagerly": (
        "python/littlebit2/chat.py",
        "import transformers",
        "may import transformers only inside a function",
    ),
    "command-line-imports-torch": (
        "python/littlebit2/cli/plan.py",
        "def run():\n    import torch",
        "must not refer to torch",
    ),
    "command-line-imports-the-quantizer-eagerly": (
        "python/littlebit2/cli/plan.py",
        "from littlebit2.quantize import QuantConfig",
        "may import littlebit2.quantize.QuantConfig only inside a function",
    ),
    "architecture-imports-transformers": (
        "python/littlebit2/architecture/tensors.py",
        "def select():\n    import transformers",
        "must not refer to transformers",
    ),
    "architecture-names-import-torch-eagerly": (
        "python/littlebit2/architecture/select.py",
        "from torch import nn",
        "may import torch.nn only inside a function",
    ),
    "disk-imports-torch": (
        "python/littlebit2/disk/files.py",
        "def save(tensor):\n    import torch",
        "must not refer to torch",
    ),
    "offline-imports-transformers": (
        "python/littlebit2/offline/pipeline.py",
        "def run():\n    import transformers",
        "must not refer to transformers",
    ),
}


@pytest.mark.parametrize(("path", "source", "message"), PYTHON_OFFENDERS.values(), ids=PYTHON_OFFENDERS)
def test_python_rule_can_fail(tmp_path: Path, path: str, source: str, message: str) -> None:
    plant(tmp_path, path, source)
    (finding,) = import_rules.python_findings(tmp_path)
    assert finding.path == path
    assert message in finding.message


PYTHON_PERMITTED = {
    "packing-uses-native": ("littlebit2_kernels/packing.py", "from . import _native, format\nimport numpy"),
    "quantize-packs": (
        "python/littlebit2/quantize/quantizer.py",
        "import torch\nfrom littlebit2_kernels.packing import pack_signs\nfrom .spectrum import f",
    ),
    "ops-imports-triton-lazily": (
        "littlebit2_kernels/ops/calls.py",
        "def f():\n    from ..triton import launch",
    ),
    "type-checking-only": (
        "littlebit2_kernels/ops/calls.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import triton",
    ),
    "dunder-is-public": (
        "python/littlebit2/chat.py",
        "import littlebit2_kernels\nprint(littlebit2_kernels.__version__)",
    ),
}


@pytest.mark.parametrize(("path", "source"), PYTHON_PERMITTED.values(), ids=PYTHON_PERMITTED)
def test_python_rule_permits(tmp_path: Path, path: str, source: str) -> None:
    plant(tmp_path, path, source)
    assert not import_rules.python_findings(tmp_path)


INCLUDE_OFFENDERS = {
    "public-header-uses-cxx-std": ("csrc/include/littlebit2/littlebit2.h", "<vector>"),
    "public-header-uses-cuda": ("csrc/include/littlebit2/littlebit2.h", "<cuda_runtime.h>"),
    "public-header-uses-torch": ("csrc/include/littlebit2/littlebit2.h", "<torch/torch.h>"),
    "public-header-uses-core": ("csrc/include/littlebit2/littlebit2.h", '"core/status.h"'),
    "core-uses-torch": ("csrc/core/forward.cpp", "<torch/csrc/stable/tensor.h>"),
    "core-uses-python": ("csrc/core/forward.cpp", "<Python.h>"),
    "core-uses-cuda": ("csrc/core/forward.cpp", "<cuda_fp16.h>"),
    "core-uses-intrinsics": ("csrc/core/forward.cpp", "<immintrin.h>"),
    "cpu-uses-torch": ("csrc/cpu/isa/kernels_avx2.cpp", "<ATen/Parallel.h>"),
    "cpu-uses-cuda": ("csrc/cpu/isa/kernels_avx2.cpp", "<cuda.h>"),
    "cuda-uses-torch": ("csrc/cuda/gemv.cu", "<c10/cuda/CUDAStream.h>"),
    "cuda-uses-python": ("csrc/cuda/gemv.cu", "<Python.h>"),
    "cuda-uses-cpu": ("csrc/cuda/plan/plan.cpp", '"cpu/plan.h"'),
    "cuda-uses-more-of-core": ("csrc/cuda/plan/plan.cpp", '"core/signs.h"'),
    "cuda-uses-the-host-shim": ("csrc/cuda/decode/decode.h", '"cuda_host/device.h"'),
    "torch-uses-cuda": ("csrc/torch/cuda/linear.cpp", "<cuda_runtime.h>"),
    "torch-uses-unstable-headers": ("csrc/torch/ops.cpp", "<torch/extension.h>"),
    "torch-uses-kernels": ("csrc/torch/ops.cpp", '"core/status.h"'),
    "torch-uses-kernels-relatively": ("csrc/torch/ops.cpp", '"../core/status.h"'),
    "computed-include": ("csrc/core/forward.cpp", "LB2_HEADER"),
    "unknown-module": ("csrc/metal/kernels.cpp", "<vector>"),
}


@pytest.mark.parametrize(("path", "target"), INCLUDE_OFFENDERS.values(), ids=INCLUDE_OFFENDERS)
def test_include_rule_can_fail(tmp_path: Path, path: str, target: str) -> None:
    for header in ("core/status.h", "core/signs.h", "cpu/plan.h"):
        plant(tmp_path, f"csrc/{header}", "#include <stdint.h>\n")
    plant(tmp_path, path, f"/* #include <torch/torch.h> is only spoken of */\n#  include {target}\n")
    (finding,) = import_rules.include_findings(tmp_path)
    assert finding.path == path


def test_include_rule_permits_neighbors(tmp_path: Path) -> None:
    plant(tmp_path, "csrc/include/littlebit2/format.h", "#include <stdint.h>\n")
    plant(tmp_path, "csrc/core/status.h", '#include "littlebit2/format.h"\n')
    plant(tmp_path, "csrc/cpu/a.cpp", '#include <immintrin.h>\n#include "core/status.h"\n#include <array>\n')
    plant(tmp_path, "csrc/cuda/a.cu", '#include <cuda_fp16.h>\n#include <mma.h>\n#include "core/status.h"\n')
    plant(tmp_path, "tests/cpp/cuda_host/device.h", "")
    plant(tmp_path, "csrc/cuda/device.h", '#include "cuda_host/device.h"\n')
    plant(tmp_path, "csrc/torch/b.cpp", "#include <dlfcn.h>\n")
    plant(tmp_path, "csrc/torch/args.h", "#include <torch/csrc/stable/tensor.h>\n")
    plant(tmp_path, "csrc/torch/a.cpp", '#include "torch/args.h"\n#include "littlebit2/format.h"\n')
    assert not import_rules.include_findings(tmp_path)


@pytest.mark.parametrize("module", ["core", "cpu", "include", "cuda", "torch", "python"])
@pytest.mark.parametrize("call", ["std::getenv", "secure_getenv"])
def test_getenv_rule_can_fail(tmp_path: Path, module: str, call: str) -> None:
    plant(tmp_path, f"csrc/{module}/a.cpp", f'// getenv is named here\nauto* s = {call}("LB2_CPU_ISA");\n')
    plant(tmp_path, "csrc/cpu/dispatch.cpp", 'auto* s = std::getenv("LB2_CPU_ISA");\n')
    plant(tmp_path, "csrc/cuda/environment.h", 'auto* s = std::getenv("LB2_CUDA_CHAINED");\n')
    (finding,) = import_rules.getenv_findings(tmp_path)
    assert (finding.path, finding.line) == (f"csrc/{module}/a.cpp", 2)


@pytest.mark.parametrize("path", ["csrc/cpu/a.cpp", "littlebit2_kernels/a.py", "tests/a.py"])
def test_length_rule_can_fail(tmp_path: Path, path: str) -> None:
    target = plant(tmp_path, path, "\n" * import_rules.MAX_LINES)
    assert not import_rules.length_findings(tmp_path)
    target.write_text("\n" * (import_rules.MAX_LINES + 1), "utf-8")
    (finding,) = import_rules.length_findings(tmp_path)
    assert finding.path == path


@pytest.mark.parametrize(
    "text",
    [
        "see /" + "tmp/x",
        'open("/' + 'home/me/x")',
        "-I/" + "work/include",
        "get https://" + "pypi" + ".org/simple",
    ],
)
def test_text_rule_can_fail(tmp_path: Path, text: str) -> None:
    plant(tmp_path, "docs/a.md", f"a line\n{text}\n")
    (finding,) = import_rules.text_findings(tmp_path)
    assert (finding.path, finding.line) == ("docs/a.md", 2)


@pytest.mark.parametrize("text", ["build/" + "tmp/x", "a/" + "work/b", "/proc/cpuinfo", "{root}/" + "home/x"])
def test_text_rule_permits(tmp_path: Path, text: str) -> None:
    plant(tmp_path, "docs/a.md", text)
    assert not import_rules.text_findings(tmp_path)
