"""Rows and checks with plausible contents, for tests of what is made of them."""

from __future__ import annotations

from typing import Any

from benchmarks.layers.rows import Row


def row(**changes: Any) -> Row:
    """A row; ``samples`` decides the median where it is given."""
    values: dict[str, Any] = {
        "candidate": "littlebit2:cpu:exact",
        "dtype": "float32",
        "ours": True,
        "shape": "llama2-7b-up",
        "in_features": 4096,
        "out_features": 11008,
        "bpw": 0.1,
        "ranks": [136, 136],
        "tokens": 1,
        "mode": "cold",
        "threads": 1,
        "copies": 3,
        "weight_bytes": 1_000_000,
        "macs": 8_000_000,
        "samples": [0.001, 0.002, 0.003],
        **changes,
    }
    ordered = sorted(values["samples"])
    values.setdefault("median", ordered[len(ordered) // 2])
    values.setdefault("low", ordered[0])
    values.setdefault("high", ordered[-1])
    group = f"{values['shape']} bpw={values['bpw']:g} M={values['tokens']} {values['mode']}"
    values.setdefault("group", group)
    return Row(**values)
