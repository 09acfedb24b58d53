"""Install a wheel where no compiler is on PATH, and use it: ``wheel.py WHEEL [TORCH ...]``.

For each version of torch (by default that of constraints.txt): versions, the self-tests, the README's Python,
and a tiny model quantized and asked for text, each from an empty folder and from the root of a checkout that
was not built, which must not get in the way of what is installed. Of a wheel with CUDA kernels (its version
ends in +cu and a number) also that these load, and that the reports name them and say why they cannot run.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
#: Prints where both packages come from, and fails outside of site-packages.
WHERE = """
import littlebit2, littlebit2_kernels, sysconfig
for module in (littlebit2, littlebit2_kernels):
    assert module.__path__[0].startswith(sysconfig.get_path("purelib")), module.__path__
assert littlebit2.__version__ == littlebit2_kernels.__version__
"""
#: An error of an operator, thrown by our C++ and caught by torch's.
REFUSED = """
import os
os.environ["LB2_CPU_ISA"] = "neon"
import torch
from littlebit2_kernels import littlebit_linear
from littlebit2_kernels.testing import make_problem

x, packed = make_problem(3, 100, 70, [24, 8], generator=torch.Generator().manual_seed(0))
try:
    littlebit_linear(x, packed)
except RuntimeError as error:
    assert "asks for the neon kernels" in str(error), error
else:
    raise AssertionError("kernels of another processor ran")
"""
#: Both CUDA libraries load with everything that they link, and can be called where there is no driver.
CUDA_LOADS = """
import ctypes, os, torch
from littlebit2_kernels._native import cuda_ops_library_path, get_library_dir, load_ops

load_ops()
kernels = ctypes.CDLL(os.path.join(get_library_dir(), "liblittlebit2_cuda.so.1"), mode=os.RTLD_NOW)
torch.ops.load_library(str(cuda_ops_library_path()))
device = (ctypes.c_uint64 * 3)(24)
assert kernels.lb2_cuda_get_device(0, device) == 0 or not torch.cuda.is_available()
"""
#: What a report says of the CUDA kernels: the GPU that ran them, or why none did.
CUDA_STATES = "|".join(
    (
        r"\(0: ",
        "available",
        "this torch .* was built without CUDA",
        "this package was built without its CUDA kernels",
        "torch finds no usable GPU",
    )
)
MAKE_MODEL = """
import sys, torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

torch.manual_seed(0)
letters = sorted(pre_tokenizers.ByteLevel.alphabet())
tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)}, []))
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(sys.argv[1])
config = LlamaConfig(vocab_size=len(letters), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                     num_attention_heads=4, num_key_value_heads=2, bos_token_id=None, eos_token_id=None)
LlamaForCausalLM(config).save_pretrained(sys.argv[1])
"""
TOKENS = 8


class Clean:
    """An environment with the wheel, torch and what these need; PATH has its own programs only."""

    def __init__(self, folder: Path, torch: str) -> None:
        self.folder = folder
        self.checks = 0
        self.variables = {"PATH": str(folder / "bin"), "HOME": str(folder), "HF_HUB_OFFLINE": "1"}
        if "OMP_NUM_THREADS" in os.environ:  # fewer than all, where other programs take the cores
            self.variables["OMP_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"]
        # Each torch goes with its own triton, and torch 2.11 with an older setuptools.
        pinned = (ROOT / "constraints.txt").read_text("utf-8")
        self.constraints = folder.parent / "constraints.txt"
        self.constraints.write_text(
            re.sub(r"^(torch|triton|setuptools)==.*", "", pinned, flags=re.MULTILINE) + f"torch=={torch}\n"
        )
        venv.create(folder, with_pip=True, clear=True)

    def pip(self, *arguments: str) -> None:
        """Install, with the constraints of the development environment, but for torch."""
        command = [self.folder / "bin/python", "-m", "pip", "--disable-pip-version-check", "install", "-qq"]
        subprocess.run([*command, "-c", self.constraints, *arguments], check=True)

    def run(self, program: str, *arguments: str | Path, cwd: Path) -> str:
        """Run a program of the environment; returns its output, or ends with it."""
        done = subprocess.run(
            [self.folder / "bin" / program, *arguments],
            cwd=cwd,
            env=self.variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if done.returncode:
            sys.exit(f"error: {program} {' '.join(map(str, arguments))} in {cwd}:\n{done.stdout}")
        self.checks += 1
        return done.stdout


def readme_code() -> list[str]:
    """The Python of the README that stands by itself."""
    return re.findall(
        r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text("utf-8"), re.MULTILINE | re.DOTALL
    )


def clone(folder: Path) -> Path:
    """The root of a checkout that was not built, whatever was built into this one."""
    built = shutil.ignore_patterns("lib", "include", "__pycache__")
    for name in ("littlebit2_kernels", "benchmarks", "python"):
        shutil.copytree(ROOT / name, folder / name, ignore=built)
    return folder


def check_reports(clean: Clean, cwd: Path, *, cuda: bool) -> None:
    """That the reports say which kernels the wheel has, and which run."""
    built = r"\d" if cuda else "not built"
    version = re.escape(clean.run("littlebit2", "--version", cwd=cwd).split()[1])
    reports = {
        ("littlebit2", "doctor"): (
            version,
            rf"CUDA kernels for: {built}",
            r"^ok +cpu",
            rf"^(ok|-) +cuda +({CUDA_STATES})",
        ),
        ("python", "-m", "littlebit2_kernels.diagnostics"): (
            version,
            rf"^  cuda_kernels: {built}",
            "^self_test: ok$",
            rf"^  cuda: (unavailable: )?({CUDA_STATES})",
        ),
    }
    for command, patterns in reports.items():
        report = clean.run(*command, cwd=cwd)
        for pattern in patterns:
            if not re.search(pattern, report, re.MULTILINE):
                sys.exit(f"error: {' '.join(command)} in {cwd} must say {pattern!r}, got:\n{report}")


def check(clean: Clean, cwd: Path, work: Path, *, cuda: bool) -> None:
    """Everything from one folder; results go to ``work``."""
    clean.run("python", "-c", WHERE, cwd=cwd)
    clean.run("python", "-c", REFUSED, cwd=cwd)
    check_reports(clean, cwd, cuda=cuda)
    if cuda:
        clean.run("python", "-c", CUDA_LOADS, cwd=cwd)
    for code in readme_code():
        clean.run("python", "-c", code, cwd=cwd)
    if (cwd / "benchmarks").is_dir():
        clean.run("python", "-m", "benchmarks", "predict", "decode", "--gpu", "H200", cwd=cwd)
    model, packed = work / "model", work / f"packed-{cwd.name}"
    if not model.exists():
        clean.run("python", "-c", MAKE_MODEL, model, cwd=cwd)
    clean.run("littlebit2", "quantize", model, packed, "--bpw", "1.0", cwd=cwd)
    options = ("--max-new-tokens", str(TOKENS))
    clean.run("littlebit2", "generate", packed, "Once upon a time", *options, cwd=cwd)


def main(arguments: list[str] | None = None) -> None:
    """Check a wheel."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("torch", nargs="*", help="versions (default: that of constraints.txt)")
    options = parser.parse_args(arguments)
    pinned = re.findall(r"^torch==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    wheel = options.wheel.resolve()
    if not re.search(r"-py3-none-manylinux\w*_2_28_x86_64\.whl$", wheel.name):
        sys.exit(f"error: WHEEL must be one for every CPython and manylinux_2_28, got {wheel.name}")
    checks = 0
    for version in options.torch or pinned:
        print(f"checking {wheel.name} with torch {version}", flush=True)
        folder = ROOT / "build" / "wheels" / f"torch-{version}"
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "empty").mkdir(parents=True)
        clean = Clean(folder / "environment", version)
        clean.pip("torch")
        clean.pip(f"{wheel}[models]")
        for tool in ("cc", "c++", "gcc", "g++", "clang", "cmake", "ninja", "nvcc"):
            if (folder / "environment" / "bin" / tool).exists():
                sys.exit(f"error: the clean environment has {tool}")
        for cwd in (folder / "empty", clone(folder / "clone")):
            check(clean, cwd, folder, cuda="+cu" in wheel.name)
        checks += clean.checks
    print(f"{checks} passed, 0 failed")


if __name__ == "__main__":
    os.environ.pop("PYTHONPATH", None)
    main()
