"""Counts the calls that fused modules make."""

from __future__ import annotations

from typing import Any

import pytest

from littlebit2.architecture.decoder import fused
from littlebit2_kernels.fused import modules


class Calls:
    """Numbers of grouped and MLP calls by modules, of norms and residuals among them, and of rotations."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.clear()
        for name in ("run_group", "run_fused", "run_mlp"):
            monkeypatch.setattr(modules, name, self._recording(getattr(modules, name), name))
        monkeypatch.setattr(fused, "rotated", self._rotated(fused.rotated))

    def clear(self) -> None:
        """Begin again."""
        self.grouped = self.mlps = self.norms = self.residuals = self.rotations = 0

    def _recording(self, function: Any, name: str) -> Any:
        def call(*arguments: Any) -> Any:
            result = function(*arguments)
            assert result is not None
            norm, residual = (None, None) if name == "run_group" else arguments[-2:]
            self.grouped += name != "run_mlp"
            self.mlps += name == "run_mlp"
            self.norms += norm is not None
            self.residuals += residual is not None
            return result

        return call

    def _rotated(self, function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            result = function(*arguments)
            self.rotations += result is not None
            return result

        return call
