"""The binary interface of the core: what it exports, its name when it is loaded, the layout of structs."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import littlebit2_kernels
from littlebit2_kernels._native.abi import STRUCTS

ROOT = Path(__file__).resolve().parents[3]
HEADERS = ("format.h", "littlebit2.h", "cuda.h")
#: Functions that liblittlebit2_cuda defines; those above this line of cuda.h are in the core.
CUDA_PART = "/* ---- liblittlebit2_cuda ---- */"


def header(name: str) -> str:
    return (ROOT / "csrc/include/littlebit2" / name).read_text("utf-8")


def code(text: str) -> str:
    return re.sub(r"/\*.*?\*/", " ", text, flags=re.DOTALL).replace("\\\n", " ")


def functions(text: str) -> list[str]:
    return sorted(re.findall(r"^LB2_API [^;(]*?(\w+)\(", code(text), re.MULTILINE))


def exported(map_file: str) -> dict[str, list[str]]:
    """The C names of each node of a version script."""
    nodes = re.findall(r"(\w+) \{(.*?)\n\}", code((ROOT / "csrc" / map_file).read_text("utf-8")), re.DOTALL)
    return {node: re.findall(r"\b(lb2_\w+);", body) for node, body in nodes}


def abi_version() -> str:
    (found,) = re.findall(r"set\(LB2_ABI_VERSION (\d+)\)", (ROOT / "CMakeLists.txt").read_text("utf-8"))
    return str(found)


def library() -> Path:
    return Path(littlebit2_kernels.get_library_dir(), f"liblittlebit2.so.{abi_version()}")


def tool(name: str, *arguments: str | Path) -> str:
    if shutil.which(name) is None:
        pytest.skip(f"needs {name} on PATH (binutils)")
    return subprocess.run([name, *arguments], capture_output=True, text=True, check=True).stdout


def test_version_scripts_list_the_functions_of_the_headers() -> None:
    core, cuda = header("cuda.h").split(CUDA_PART)
    public = exported("littlebit2.map")
    assert public.pop("LITTLEBIT2_PRIVATE") == []
    listed = sorted(name for names in public.values() for name in names)
    assert listed == sorted(functions(header("littlebit2.h")) + functions(core))
    assert sorted(exported("littlebit2_cuda.map")["LITTLEBIT2_CUDA_1"]) == functions(cuda)
    assert len(functions(cuda)) >= 4


def test_library_exports_what_the_version_script_lists() -> None:
    symbols = tool("nm", "-D", "--defined-only", "--with-symbol-versions", library())
    found: dict[str, list[str]] = {}
    for line in symbols.splitlines():
        name, _, node = line.split()[-1].partition("@@")
        if node:  # the nodes themselves have none
            found.setdefault(node, []).append(name)
    private = found.pop("LITTLEBIT2_PRIVATE")
    expected = {node: sorted(names) for node, names in exported("littlebit2.map").items() if names}
    assert {node: sorted(names) for node, names in found.items()} == expected
    # For liblittlebit2_cuda of the same build, C++.
    assert [name for name in private if not re.match(r"_ZN3lb2(4cuda\d|4failE)", name)] == []


def test_soname() -> None:
    names = re.findall(r"\((SONAME|NEEDED)\).*\[(.*)\]", tool("readelf", "-d", library()))
    assert ("SONAME", f"liblittlebit2.so.{abi_version()}") in names
    operators = Path(littlebit2_kernels.get_library_dir(), "liblittlebit2_torch.so")
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", tool("readelf", "-d", operators))
    assert f"liblittlebit2.so.{abi_version()}" in needed


def test_every_field_and_constant_is_pinned() -> None:
    pinned = (ROOT / "tests/cpp/core/abi_test.c").read_text("utf-8")
    text = "".join(code(header(name)) for name in HEADERS)
    structs = re.findall(r"typedef struct (\w+) \{(.*?)\} \1;", text, re.DOTALL)
    assert len(structs) >= 9
    fields = []
    for struct, body in structs:
        declarators = [part for line in body.split(";") for part in line.split(",") if part.strip()]
        names = [re.search(r"(\w+)\s*(\[\w+\])*\s*$", part) for part in declarators]
        fields += [(struct, name[1]) for name in names if name is not None]
    assert sorted(re.findall(r"^FIELD\((\w+), (\w+), \d+\);$", pinned, re.MULTILINE)) == sorted(fields)
    sizes = re.findall(r"^SIZE\((\w+), \d+\);$", pinned, re.MULTILINE)
    assert sorted(sizes) == sorted(struct for struct, _ in structs)
    constants = re.findall(r"^#define (LB2_\w+)\s+\d+\s*$", text, re.MULTILINE)
    assert sorted(re.findall(r"^CONSTANT\((\w+), \d+\);$", pinned, re.MULTILINE)) == sorted(constants)


def test_layout_is_as_pinned(tmp_path: Path) -> None:
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    assert compiler is not None, "a C compiler is needed to build this package"
    source = (ROOT / "tests/cpp/core/abi_test.c").read_text("utf-8")
    check = [compiler, "-std=c11", "-fsyntax-only", f"-I{littlebit2_kernels.get_include()}", "-x", "c", "-"]
    subprocess.run(check, input=source, text=True, check=True)
    moved = source.replace("FIELD(lb2_path, u, 16)", "FIELD(lb2_path, u, 24)")
    assert moved != source
    failed = subprocess.run(check, input=moved, text=True, check=False, capture_output=True)
    assert failed.returncode != 0
    assert "lb2_path.u" in failed.stderr


def test_python_mirrors_the_structs() -> None:
    """Every field of every struct that Python fills has the size and the place that the compiler gives it."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    assert compiler is not None, "a C compiler is needed to build this package"
    checks = []
    for name, struct in STRUCTS.items():
        checks.append(f"sizeof({name}) == {ctypes.sizeof(struct)}")
        for field, *_ in struct._fields_:
            place = getattr(struct, field)
            checks.append(f"offsetof({name}, {field}) == {place.offset}")
            checks.append(f"sizeof((({name}*)0)->{field}) == {place.size}")
    lines = [f'_Static_assert({check}, "{check}");' for check in checks]
    source = "\n".join(["#include <stddef.h>", '#include "littlebit2/cuda.h"', *lines])
    command = [compiler, "-std=c11", "-fsyntax-only", f"-I{ROOT / 'csrc/include'}", "-x", "c", "-"]
    subprocess.run(command, input=source, text=True, check=True)
    moved = source.replace("offsetof(lb2_cuda_plan, launches) == ", "offsetof(lb2_cuda_plan, launches) == 1")
    failed = subprocess.run(command, input=moved, text=True, check=False, capture_output=True)
    assert "lb2_cuda_plan, launches" in failed.stderr
