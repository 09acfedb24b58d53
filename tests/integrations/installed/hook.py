"""The import hook of this tree, not the one that may be installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]


def load_hook() -> Any:
    """A fresh copy of the module."""
    spec = importlib.util.spec_from_file_location(
        "hook_of_this_tree", ROOT / "python/_littlebit2_autoregister.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
