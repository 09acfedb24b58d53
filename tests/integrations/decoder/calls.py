"""Counts the calls that fused modules make."""

from __future__ import annotations

from typing import Any

import pytest

from littlebit2_kernels.fused import modules


class Calls:
    """Numbers of calls of ``grouped_linear`` and ``mlp`` by modules, norms and residuals among them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.clear()
        for name in ("run_group", "run_fused", "run_mlp"):
            monkeypatch.setattr(modules, name, self._recording(getattr(modules, name), name))

    def clear(self) -> None:
        """Begin again."""
        self.grouped = self.mlps = self.norms = self.residuals = 0

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
