"""Lets the CPU parts of SGLang be imported where packages that they do not use are not to be had for CPUs.

SGLang imports these at its top, for images, for GGUF files and for GPUs. Python runs this file in each
process whose path has this folder: ``sglang_checks.py`` puts it there, for SGLang's own processes too.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Sequence
from typing import Any, ClassVar
from unittest.mock import MagicMock

_ABSENT = ("gguf", "sgl_kernel", "torchvision")


class _Absent(types.ModuleType):
    __path__: ClassVar[list[str]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock(name=f"{self.__name__}.{name}")


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self) -> None:
        self.stands_in = False

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name == "sglang" and not self.stands_in:
            # transformers must see that torchvision is not there.
            import transformers

            _ = transformers.AutoProcessor
            self.stands_in = True
        if self.stands_in and name.partition(".")[0] in _ABSENT:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Absent(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """A module that is not there has nothing to run."""


sys.meta_path.insert(0, _Finder())
