"""Checks of SGLang on the CPU: tokens of packed models on one and two ranks, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from steps import HERE, Steps, run_json

__all__ = ["check_sglang"]

#: Where ``.ci/serving.py`` puts SGLang.
_PACKAGES = Path(sys.prefix) / "sglang"
_LOST = "model.layers.1.mlp.up_proj.u1"


def check_sglang(
    steps: Steps,
    runs: Sequence[tuple[str, int]],
    prompts: list[list[int]],
    expected: dict[str, list[list[int]]],
) -> None:
    """Compare the tokens of models, each on a number of ranks, with ``expected``."""
    for name, ranks in runs:
        with steps.step(f"SGLang: {name}, {ranks} ranks, {len(prompts)} prompts alone and together"):
            found = _run(steps, steps.work / "models" / name, prompts, ranks)
            for key in ("alone", "together"):
                for index, (got, wanted) in enumerate(zip(found[key], expected[name], strict=True)):
                    assert got == wanted, f"{key}, prompt {index}: expected {wanted}, got {got}"
    damaged = steps.work / "models" / "damaged-sglang"
    shutil.rmtree(damaged, ignore_errors=True)
    shutil.copytree(steps.work / "models" / "packed-head", damaged)
    tensors = {name: one.clone() for name, one in load_file(damaged / "model.safetensors").items()}
    del tensors[_LOST]
    save_file(tensors, damaged / "model.safetensors", {"format": "pt"})
    adapters = {"enable_lora": True, "max_lora_rank": 8, "lora_target_modules": ["q_proj"]}
    for what, path, settings, named in (
        ("a scale is missing", damaged, {}, _LOST),
        (
            "adapters",
            steps.work / "models" / "packed-head",
            adapters,
            "adapters beside packed layers are not served",
        ),
    ):
        with steps.step(f"SGLang refuses: {what}"):
            try:
                _run(steps, path, prompts[:1], 1, settings)
            except RuntimeError:
                log = _log(steps, path, 1).with_suffix(".log").read_text()
                assert named in log, f"expected {named} to be named, got {log[-2000:]}"
            else:
                raise AssertionError("the checkpoint was served")


def _log(steps: Steps, path: Path, ranks: int) -> Path:
    return steps.work / f"sglang-{path.name}-{ranks}"


def _run(
    steps: Steps,
    path: Path,
    prompts: list[list[int]],
    ranks: int,
    settings: dict[str, Any] | None = None,
) -> dict[str, Any]:
    log = _log(steps, path, ranks)
    out = log.with_suffix(".out.json")
    out.unlink(missing_ok=True)
    job = {
        "model": str(path),
        "prompts": prompts,
        "tokens": 16,
        "ranks": ranks,
        "out": str(out),
        "settings": settings or {},
    }
    more = {
        "SGLANG_USE_CPU_ENGINE": "1",
        # SGLang wants a core for each of several ranks.
        **({"SGLANG_CPU_OMP_THREADS_BIND": "|".join(map(str, range(ranks)))} if ranks > 1 else {}),
        "PYTHONPATH": os.pathsep.join(map(str, (_PACKAGES, HERE / "stubs"))),
    }
    run_json(steps, "sglang_offline.py", [job], log.name, more)
    found: dict[str, Any] = json.loads(out.read_text())
    return found
