"""The checks behind test_import_rules.py: who may know whom, and what no file may contain.

The tables below are the rows of CONTRIBUTING.md's module table. Python is read through its syntax tree,
C, C++ and CUDA through their ``#include`` lines; nothing is imported or compiled, so the rules hold for
modules that cannot be built on the machine at hand. Standard-library modules are open to every Python module
unless a row forbids them.
"""

from __future__ import annotations

import ast
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MAX_LINES = 600

PYTHON_ROOTS = {"littlebit2_kernels": "littlebit2_kernels", "littlebit2": "python/littlebit2"}
CXX_SUFFIXES = {".h", ".hpp", ".c", ".cc", ".cpp", ".cu", ".cuh"}
#: Suffixes of the project's own text; "" is Makefile, LICENSE, .ci/run and dot files. Not logs, not data.
TEXT_SUFFIXES = CXX_SUFFIXES | {"", ".py", ".md", ".txt", ".toml", ".yaml", ".yml", ".json", ".cmake", ".csv"}

#: Ways to reach compiled code from Python.
NATIVE = (
    "littlebit2_kernels._native",
    "torch.ops.littlebit2",
    "torch.ops.load_library",
    "torch.utils.cpp_extension",
    "ctypes",
)


@dataclass(frozen=True)
class Finding:
    """One broken rule."""

    path: str
    line: int
    message: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.message}"


@dataclass(frozen=True)
class ModuleRule:
    """What the modules under one dotted prefix may refer to.

    Attributes:
        may: prefixes of modules outside the standard library that are allowed.
        never: prefixes that stay forbidden although ``may`` or the standard library covers them.
        lazily: prefixes allowed only inside functions, so that importing the module stays free of them.
        public_only: whether underscore names of the kernel package are out of reach.
    """

    may: tuple[str, ...]
    never: tuple[str, ...] = ()
    lazily: tuple[str, ...] = ()
    public_only: bool = False


_KERNELS = "littlebit2_kernels"
_USER_BASE = ("torch", "numpy", "safetensors", "tqdm")

_BELOW_LINEAR = ("dispatch", "format", "functional", "ops", "prepacked", "reference", "state")

#: Modules of the Triton kernels: all but ``backend``, which imports them once a call is to run there.
_TRITON_KERNELS = (
    *("configs", "forward", "fused", "gemm", "gemv", "launch", "operand", "ops", "plan", "slots"),
    *("transposed", "unpack", "xnor"),
)

#: The row with the longest matching prefix applies.
PYTHON_RULES = {
    f"{_KERNELS}.version": ModuleRule(may=()),
    f"{_KERNELS}.format": ModuleRule(may=("torch",), never=NATIVE),
    f"{_KERNELS}.reference": ModuleRule(may=("torch", f"{_KERNELS}.format"), never=NATIVE),
    f"{_KERNELS}.testing": ModuleRule(
        may=("torch", f"{_KERNELS}.format", f"{_KERNELS}.reference"), never=NATIVE
    ),
    # The C ABI on numpy arrays.
    f"{_KERNELS}._native.abi": ModuleRule(may=("numpy", f"{_KERNELS}.format")),
    f"{_KERNELS}.packing": ModuleRule(
        may=("torch", "numpy", f"{_KERNELS}.format", f"{_KERNELS}._native"),
    ),
    f"{_KERNELS}.state": ModuleRule(may=("torch", f"{_KERNELS}.format"), never=NATIVE),
    f"{_KERNELS}.linear": ModuleRule(
        may=(
            "torch",
            *(f"{_KERNELS}.{module}" for module in _BELOW_LINEAR),
        ),
        never=NATIVE,
    ),
    f"{_KERNELS}.triton": ModuleRule(
        may=(
            *("torch", "triton", f"{_KERNELS}.format", f"{_KERNELS}.gpu", f"{_KERNELS}.triton"),
            *(f"{_KERNELS}.ops.autograd", f"{_KERNELS}.ops.operands"),
        ),
        never=NATIVE,
    ),
    # What the rest of the package imports; it imports the kernels once a call is to run there.
    f"{_KERNELS}.triton.backend": ModuleRule(
        may=("torch", f"{_KERNELS}.format", f"{_KERNELS}.gpu"), lazily=(f"{_KERNELS}.triton",), never=NATIVE
    ),
    # What decides needs no Triton, but for the version that a stored configuration was tuned with.
    **{
        f"{_KERNELS}.triton.{name}": ModuleRule(
            may=("torch", f"{_KERNELS}.format", f"{_KERNELS}.gpu", f"{_KERNELS}.triton.plan"),
            lazily=lazily,
            never=NATIVE,
        )
        for name, lazily in (("configs", ("triton",)), ("plan", ()))
    },
    _KERNELS: ModuleRule(
        may=("torch", "numpy", _KERNELS),
        lazily=("triton", *(f"{_KERNELS}.triton.{name}" for name in _TRITON_KERNELS)),
    ),
    "littlebit2._messages": ModuleRule(may=()),
    "littlebit2.disk": ModuleRule(may=("littlebit2.disk",)),
    # Names of model parts; what the command line imports of it needs no torch.
    **{
        f"littlebit2.architecture.{name}": ModuleRule(
            may=("littlebit2.architecture.names",), lazily=("torch",), public_only=True
        )
        for name in ("names", "select")
    },
    "littlebit2.architecture": ModuleRule(
        may=("torch", "littlebit2.architecture", _KERNELS), never=NATIVE, public_only=True
    ),
    "littlebit2.quantize": ModuleRule(
        may=(
            *_USER_BASE,
            "littlebit2.architecture",
            "littlebit2.disk",
            "littlebit2.quantize",
            f"{_KERNELS}.format",
            f"{_KERNELS}.reference",
            f"{_KERNELS}.packing",
        ),
        never=NATIVE,
        public_only=True,
    ),
    "littlebit2.checkpoint": ModuleRule(
        may=(
            "torch",
            "safetensors",
            "littlebit2._messages",
            "littlebit2.architecture.names",
            "littlebit2.checkpoint",
            "littlebit2.disk",
            f"{_KERNELS}.format",
            f"{_KERNELS}.int8.rounding",
            f"{_KERNELS}.packing",
            f"{_KERNELS}.state",
        ),
        never=NATIVE,
        public_only=True,
    ),
    # Layouts know headers and specs, not the reader that uses them.
    "littlebit2.checkpoint.formats": ModuleRule(
        may=(
            "torch",
            "littlebit2.checkpoint.errors",
            "littlebit2.checkpoint.formats",
            "littlebit2.checkpoint.headers",
            "littlebit2.checkpoint.specs",
            f"{_KERNELS}.format",
            f"{_KERNELS}.packing",
            f"{_KERNELS}.state",
        ),
        never=NATIVE,
        public_only=True,
    ),
    "littlebit2.offline": ModuleRule(
        may=(
            "torch",
            "safetensors",
            "tqdm",
            "littlebit2.architecture",
            "littlebit2.checkpoint",
            "littlebit2.disk",
            "littlebit2.offline",
            "littlebit2.quantize",
            f"{_KERNELS}.format",
            f"{_KERNELS}.state",
            f"{_KERNELS}.version",
        ),
        # The trial builds the model on the meta device, where transformers is installed.
        lazily=("littlebit2.integrations",),
        never=NATIVE,
        public_only=True,
    ),
    **{
        f"littlebit2.offline.{name}": ModuleRule(
            may=(
                "littlebit2.architecture",
                "littlebit2.checkpoint",
                "littlebit2.quantize",
                f"{_KERNELS}.format",
            ),
            never=NATIVE,
            lazily=("littlebit2.integrations", "transformers"),
            public_only=True,
        )
        for name in ("choice", "rehearsal")
    },
    "littlebit2.train": ModuleRule(
        may=("torch", "numpy", "littlebit2.architecture", "littlebit2.disk", "littlebit2.train", _KERNELS),
        never=NATIVE,
        lazily=("pyarrow",),
        public_only=True,
    ),
    "littlebit2.train.recipe": ModuleRule(
        may=(*_USER_BASE, "accelerate", "transformers", "littlebit2", _KERNELS),
        never=NATIVE,
        lazily=("lm_eval",),
        public_only=True,
    ),
    # Runs the model itself: knows the streamed quantizer, training and transformers.
    "littlebit2.blockwise": ModuleRule(
        may=(
            *_USER_BASE,
            *(f"littlebit2.{name}" for name in ("architecture", "blockwise", "checkpoint", "disk")),
            *(f"littlebit2.{name}" for name in ("offline", "quantize", "train")),
            f"{_KERNELS}.format",
            f"{_KERNELS}.reference",
        ),
        lazily=("transformers", "littlebit2.integrations"),
        never=NATIVE,
        public_only=True,
    ),
    "littlebit2.blockwise.plot": ModuleRule(
        may=("littlebit2._messages", "littlebit2.blockwise"),
        lazily=("matplotlib",),
        never=NATIVE,
        public_only=True,
    ),
    # `--help` and usage errors do not wait for torch.
    "littlebit2.cli": ModuleRule(
        may=(
            "littlebit2._messages",
            "littlebit2.architecture.names",
            "littlebit2.architecture.select",
            "littlebit2.cli",
        ),
        lazily=(
            *(
                f"littlebit2.{name}"
                for name in ("blockwise", "calibrate", "checkpoint", "generate", "offline", "plan")
            ),
            "littlebit2.quantize",
            "littlebit2.generate_batch",
            "littlebit2.own_text",
            "littlebit2.synthesize",
            "littlebit2.train",
            "shtab",
            f"{_KERNELS}.diagnostics",
        ),
        public_only=True,
    ),
    "littlebit2.integrations": ModuleRule(
        may=(
            *_USER_BASE,
            *("accelerate", "peft", "transformers", "vllm", "sglang"),
            "littlebit2",
            _KERNELS,
        ),
        public_only=True,
    ),
    "littlebit2": ModuleRule(
        may=(*_USER_BASE, "littlebit2", _KERNELS),
        lazily=("transformers", "littlebit2.integrations"),
        public_only=True,
    ),
}

_LIBC = r"(assert|ctype|errno|float|inttypes|limits|math|std(align|arg|bool|def|int|io|lib)|string)\.h"
_STD = rf"[a-z_]+|{_LIBC}"
_CPU = r"immintrin\.h|arm_neon\.h|cpuid\.h|intrin\.h|sys/(auxv|syscall|sysctl)\.h|unistd\.h|asm/hwcap\.h"
_CUDA = r"cuda\w*\.h|mma\.h|(cuda|cub|nv)/.*"
#: What the kernels may know of the core, and the shim through which tests execute them on the host.
_CORE_FOR_CUDA = r"csrc/core/(check|shape|status)\.h"
_STABLE_TORCH = r"torch/csrc/stable/.*|torch/csrc/inductor/aoti_torch/c/.*|torch/headeronly/.*"
#: Our public headers, the generated ones (which no scan of the tree can find) included.
_PUBLIC = r"csrc/include/.*|littlebit2/.*"

#: Includes that each folder of csrc may name: our own files by their path from the root, others as written.
CXX_RULES = {
    "include": re.compile(rf"{_LIBC}|{_PUBLIC}"),
    "core": re.compile(rf"{_STD}|{_PUBLIC}|csrc/(core|cpu)/.*"),
    "cpu": re.compile(rf"{_STD}|{_CPU}|{_PUBLIC}|csrc/(core|cpu)/.*"),
    "cuda": re.compile(rf"{_STD}|{_CUDA}|{_PUBLIC}|{_CORE_FOR_CUDA}|csrc/cuda/.*"),
    "torch": re.compile(rf"{_STD}|dlfcn\.h|{_STABLE_TORCH}|{_PUBLIC}|csrc/torch/.*"),
}

#: Includes that single files may name besides: the shims through which tests execute kernels on the host.
CXX_FILES = {
    "csrc/cuda/device.h": re.compile(r"(tests/cpp/)?cuda_host/device\.h"),
    "csrc/cpu/isa/kernels_amx.cpp": re.compile(r"(tests/cpp/)?amx_host/(tiles|instructions|bytes)\.h"),
}

#: The environment is read in two places: the choice of the instruction set, the switch of chained launches.
GETENV_FILES = re.compile(r"csrc/cpu/dispatch\.\w+|csrc/cuda/environment\.h")

# Put together from pieces, so that this file does not contain what it looks for.
_ABSOLUTE = "|".join(("tmp", "work", "root", "home", "Users"))
FORBIDDEN_TEXT = {
    "a path of one machine": re.compile(rf"(?:(?<![\w.)}}\]*-])|(?<=-[IL]))/({_ABSOLUTE})/\w"),
    "a package registry's host": re.compile(
        "|".join(("pypi" + r"\.org", "python" + "hosted", "test" + "pypi"))
    ),
}


def source_files(root: Path) -> Iterator[Path]:
    """Yield the project's text files, without environments, caches and build outputs."""
    skipped = {"build", "dist", "lib", "__pycache__"}
    for directory, subdirectories, names in os.walk(root):
        subdirectories[:] = sorted(
            name
            for name in subdirectories
            if name not in skipped and not name.endswith(".egg-info") and (name[0] != "." or name == ".ci")
        )
        if directory == str(root / _KERNELS):
            # A copy of csrc/include that the build places next to the library.
            subdirectories[:] = [name for name in subdirectories if name != "include"]
        for name in sorted(names):
            path = Path(directory, name)
            # In a worktree of git, .git is a file.
            if name != ".git" and path.suffix in TEXT_SUFFIXES and path.is_file():
                yield path


# --- Python ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reference:
    """A dotted name that a module refers to; ``eager`` if merely importing the module does so."""

    name: str
    line: int
    eager: bool


class _References(ast.NodeVisitor):
    """Collects imports, dynamic imports with a literal name, and attributes of imported modules."""

    def __init__(self, package: str) -> None:
        self.package = package
        self.found: list[Reference] = []
        self._aliases: dict[str, str] = {}
        self._deferred = 0

    def _add(self, name: str, node: ast.expr | ast.stmt) -> None:
        self.found.append(Reference(name, node.lineno, eager=not self._deferred))

    def _visit_deferred(self, nodes: list[ast.stmt]) -> None:
        self._deferred += 1
        for node in nodes:
            self.visit(node)
        self._deferred -= 1

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        for outside in (*node.decorator_list, node.args, *([node.returns] if node.returns else [])):
            self.visit(outside)
        self._visit_deferred(node.body)

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_If(self, node: ast.If) -> None:
        if ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            self._visit_deferred(node.body)
            for other in node.orelse:
                self.visit(other)
        else:
            self.generic_visit(node)

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self._add(alias.name, node)
            top = alias.name.split(".")[0]
            self._aliases[alias.asname or top] = alias.name if alias.asname else top

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        base = node.module or ""
        if node.level:
            parents = self.package.split(".")
            anchor = ".".join(parents[: len(parents) - node.level + 1])
            base = f"{anchor}.{base}" if base else anchor
        for alias in node.names:
            name = base if alias.name == "*" else f"{base}.{alias.name}"
            self._add(name, node)
            self._aliases[alias.asname or alias.name] = name

    def visit_Call(self, node: ast.Call) -> None:
        if ast.unparse(node.func) in ("importlib.import_module", "import_module", "__import__"):
            literal = node.args[0] if node.args else None
            if isinstance(literal, ast.Constant) and isinstance(literal.value, str):
                self._add(self.package + literal.value if literal.value[0] == "." else literal.value, node)
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        parts: list[str] = []
        inner: ast.expr = node
        while isinstance(inner, ast.Attribute):
            parts.append(inner.attr)
            inner = inner.value
        if isinstance(inner, ast.Name) and inner.id in self._aliases:
            self._add(".".join([self._aliases[inner.id], *reversed(parts)]), node)
        else:
            self.generic_visit(node)


def _under(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def _objection(reference: Reference, module: ModuleRule) -> str | None:
    name = reference.name
    if _under(name, module.never):
        return f"must not refer to {name}"
    if module.public_only and name.startswith(_KERNELS + "."):
        private = [part for part in name.split(".") if part.startswith("_") and not part.endswith("__")]
        if private:
            return f"must not use {name}: {private[0]} is private to {_KERNELS}"
    if _under(name, module.lazily):
        return f"may import {name} only inside a function" if reference.eager else None
    if _under(name, module.may) or name.split(".")[0] in sys.stdlib_module_names:
        return None
    return f"must not refer to {name}"


def python_findings(root: Path) -> list[Finding]:
    """Check every Python module of the two packages against PYTHON_RULES."""
    findings: dict[tuple[str, int], Finding] = {}
    for top, directory in PYTHON_ROOTS.items():
        for path in sorted((root / directory).rglob("*.py")):
            inside = path.relative_to(root / directory).with_suffix("").parts
            is_package = inside[-1] == "__init__"
            module = ".".join([top, *(inside[:-1] if is_package else inside)])
            package = module if is_package else module.rpartition(".")[0]
            row = max((row for row in PYTHON_RULES if _under(module, (row,))), key=len)
            visitor = _References(package)
            visitor.visit(ast.parse(path.read_text("utf-8"), str(path)))
            for reference in visitor.found:
                objection = _objection(reference, PYTHON_RULES[row])
                where = str(path.relative_to(root))
                if objection is not None:
                    # One finding a line: `from x import a, b` and uses of an import repeat themselves.
                    findings.setdefault(
                        (where, reference.line), Finding(where, reference.line, f"{row} {objection}")
                    )
    return list(findings.values())


# --- C, C++, CUDA ------------------------------------------------------------------------------------


def cxx_files(root: Path) -> list[Path]:
    """The sources and headers under csrc."""
    return sorted(path for path in (root / "csrc").rglob("*") if path.suffix in CXX_SUFFIXES)


def _without_comments(text: str) -> str:
    """Blank out comments, keeping line numbers; string literals stay, for they may hold ``//``."""
    token = re.compile(r'"(?:\\.|[^"\\\n])*"|//[^\n]*|/\*.*?\*/', re.DOTALL)
    return token.sub(lambda m: m[0] if m[0][0] == '"' else "\n" * m[0].count("\n"), text)


def _included_name(root: Path, path: Path, written: str) -> str:
    for base in (path.parent, root / "csrc", root / "csrc/include"):
        candidate = Path(os.path.normpath(base / written))
        if candidate.is_file() and candidate.is_relative_to(root):
            return candidate.relative_to(root).as_posix()
    return written


def include_findings(root: Path) -> list[Finding]:
    """Check every ``#include`` under csrc against CXX_RULES."""
    findings = []
    for path in cxx_files(root):
        where = path.relative_to(root)
        module = where.parts[1]
        if module not in CXX_RULES:
            findings.append(Finding(str(where), 1, f"csrc/{module} is not a folder of CXX_RULES"))
            continue
        for number, line in enumerate(_without_comments(path.read_text("utf-8")).splitlines(), 1):
            directive = re.match(r"\s*#\s*(?:include|include_next|import)\b\s*(.*)", line)
            if directive is None:
                continue
            target = re.match(r'[<"]([^>"]+)[>"]', directive[1])
            if target is None:
                findings.append(Finding(str(where), number, f"cannot tell what {directive[1]!r} includes"))
                continue
            allowed = (CXX_RULES[module], CXX_FILES.get(where.as_posix()))
            name = _included_name(root, path, target[1])
            if not any(pattern and pattern.fullmatch(name) for pattern in allowed):
                findings.append(Finding(str(where), number, f"csrc/{module} must not include {target[1]}"))
    return findings


def getenv_findings(root: Path) -> list[Finding]:
    """Find reads of the environment outside GETENV_FILES."""
    findings = []
    for path in cxx_files(root):
        where = path.relative_to(root).as_posix()
        if GETENV_FILES.fullmatch(where):
            continue
        for number, line in enumerate(_without_comments(path.read_text("utf-8")).splitlines(), 1):
            if re.search(r"\b(secure_)?getenv\b|\benviron\b", line):
                findings.append(Finding(where, number, "must not read the environment"))
    return findings


# --- every file --------------------------------------------------------------------------------------


def length_findings(root: Path) -> list[Finding]:
    """Find source files of more than MAX_LINES lines."""
    findings = []
    for path in source_files(root):
        if path.suffix in CXX_SUFFIXES | {".py"}:
            lines = len(path.read_text("utf-8").splitlines())
            if lines > MAX_LINES:
                where = str(path.relative_to(root))
                findings.append(Finding(where, lines, f"has {lines} lines, more than {MAX_LINES}: split it"))
    return findings


def text_findings(root: Path) -> list[Finding]:
    """Find text that ties the tree to one machine or one package registry."""
    findings = []
    for path in source_files(root):
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
            for what, pattern in FORBIDDEN_TEXT.items():
                match = pattern.search(line)
                if match is not None:
                    findings.append(Finding(str(path.relative_to(root)), number, f"names {what}: {match[0]}"))
    return findings
