"""``make test-serving``: packed models in vLLM on this machine's CPU give the tokens of ``littlebit2.load``.

Runs in an environment that holds vLLM and this package, installed from its wheel. Everything stays on the
loopback interface, and ends after 15 minutes.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from serving_checks import check_server
from sglang_checks import check_sglang
from steps import Steps, run_json
from tiny_models import ADAPTER_RANK, MODELS, make_adapter, make_experts, make_model

import littlebit2_kernels

_SECONDS = 15 * 60
#: Lengths of the prompts.
_LENGTHS = (1, 2, 3, 5, 8, 16, 17, 33, 64, 100, 171, 250)
_TOKENS = 16

#: ``MODEL+ADAPTER`` is a model with a LoRA adapter beside its packed layers.
_ADAPTER = "two-path+adapter"
_EAGER = ("llama", "two-path", "qwen2", "gemma2", "phi3", "int8", "int8-tied", "packed-head", _ADAPTER)
_COMPILED = ("llama", "two-path", "int8")
_SGLANG = ("int8-tied", "packed-head")
_SGLANG_RANKS = ("int8",)
_RANKS = ("llama", "phi3", "one-kv-head", "int8", "packed-head", _ADAPTER)
#: Least of the vocabularies of :data:`MODELS`.
_LEAST_VOCABULARY = 300

Tensors = dict[str, torch.Tensor]
_LAYER = "model.layers.1.mlp.up_proj"
#: A change to a checkpoint, and what the refusal must name.
_DAMAGES: dict[str, tuple[Callable[[Tensors], Any], str]] = {
    "a sign matrix is missing": (lambda t: t.pop(f"{_LAYER}.U_packed"), _LAYER),
    "a scale is missing": (lambda t: t.pop(f"{_LAYER}.u1"), f"{_LAYER}.u1"),
    "a norm is missing": (lambda t: t.pop("model.norm.weight"), "model.norm.weight"),
    "a dense layer is missing": (
        lambda t: t.pop("model.layers.0.mlp.down_proj.weight"),
        "model.layers.0.mlp.down_proj.weight",
    ),
    "a scale is not finite": (lambda t: t[f"{_LAYER}.u1"].fill_(float("nan")), _LAYER),
}


def _spoil_head(tensors: Tensors) -> None:
    tensors["lm_head.weight_scale"][0] = float("inf")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, help="folder for models and logs (default: a temporary one)")
    parser.add_argument("--only", default="", help="run the groups whose names hold this")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="littlebit2-serving-") as temporary:
        # Absolute: what is started below runs in other folders.
        work = (options.work or Path(temporary)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        return check(Steps(work, _SECONDS), options.only)


def check(steps: Steps, only: str) -> int:
    site = Path(littlebit2_kernels.__file__).parents[1]
    print(f"littlebit2_kernels of {site}", flush=True)
    draw = random.Random(0)
    prompts = [[draw.randrange(3, _LEAST_VOCABULARY) for _ in range(length)] for length in _LENGTHS]
    wanted = dict.fromkeys([*_EAGER, *_COMPILED, *_RANKS, *_SGLANG, *_SGLANG_RANKS])
    names = [*(name for name in MODELS if name in wanted), *(name for name in wanted if name not in MODELS)]
    expected: dict[str, list[list[int]]] = {}
    with steps.step("tokens of littlebit2.load and generate"):
        jobs = []
        for name in names:
            path, adapter = _paths(steps, name)
            shutil.rmtree(adapter or path, ignore_errors=True)
            if adapter is None:
                make_model(name, path)
            else:
                make_adapter(path, adapter)
            out = steps.work / f"reference-{name}.json"
            jobs.append(
                {
                    "model": str(path),
                    "prompts": prompts,
                    "tokens": _TOKENS,
                    "out": str(out),
                    "adapter": adapter and str(adapter),
                }
            )
        run_json(steps, "reference.py", jobs, "reference")
        expected = {
            name: json.loads(Path(job["out"]).read_text())["tokens"]
            for name, job in zip(names, jobs, strict=True)
        }
        for name, tokens in expected.items():
            assert len({tuple(one) for one in tokens}) > len(tokens) // 2, f"{name} says always the same"
        without = expected[_ADAPTER.partition("+")[0]]
        assert expected[_ADAPTER] != without, "the adapter changes nothing"
    if not expected:
        return steps.close()
    groups: dict[str, Callable[[], None]] = {
        "eager": lambda: _offline(steps, "eager", _EAGER, {"enforce_eager": True}, prompts, expected),
        "compiled": lambda: _offline(steps, "compiled", _COMPILED, {}, prompts, expected),
        "restarted": lambda: _offline(
            steps, "restarted with a warm cache", _COMPILED[:1], {}, prompts, expected
        ),
        "ranks": lambda: _offline(
            steps,
            "two ranks",
            _RANKS,
            {"enforce_eager": True, "tensor_parallel_size": 2},
            prompts,
            expected,
        ),
        "refused": lambda: _refused(steps, prompts),
        "sglang": lambda: check_sglang(
            steps,
            [*((name, 1) for name in _SGLANG), *((name, 2) for name in _SGLANG_RANKS)],
            prompts,
            expected,
        ),
        "serve": lambda: check_server(steps, steps.work / "models" / "llama", prompts, expected["llama"]),
    }
    for name, group in groups.items():
        if only in name:
            group()
    return steps.close()


def _paths(steps: Steps, name: str) -> tuple[Path, Path | None]:
    """Directories of a model and of its adapter."""
    model, _, adapter = name.partition("+")
    models = steps.work / "models"
    return models / model, models / f"{model}-{adapter}" if adapter else None


def _offline(
    steps: Steps,
    how: str,
    names: tuple[str, ...],
    settings: dict[str, Any],
    prompts: list[list[int]],
    expected: dict[str, list[list[int]]],
) -> None:
    log = how.replace(" ", "-")
    jobs = []
    for name in names:
        path, adapter = _paths(steps, name)
        job = {
            "model": str(path),
            "prompts": prompts,
            "tokens": _TOKENS,
            "out": str(steps.work / f"{log}-{name}.json"),
            "settings": settings,
        }
        if adapter is not None:
            job["settings"] = {**settings, "enable_lora": True, "max_lora_rank": ADAPTER_RANK}
            job["adapter"] = str(adapter)
        jobs.append(job)
    ended: Exception | None = None
    try:
        run_json(steps, "offline.py", jobs, log)
    except RuntimeError as error:
        ended = error
    for name, job in zip(names, jobs, strict=True):
        with steps.step(f"{how}: {name}, {len(prompts)} prompts alone and together"):
            out = Path(job["out"])
            if not out.exists():
                raise ended or RuntimeError("the run left no result")
            found = json.loads(out.read_text())
            out.unlink()
            assert "error" not in found, found["error"]
            for key in ("alone", "together"):
                for index, (got, wanted) in enumerate(zip(found[key], expected[name], strict=True)):
                    assert got == wanted, f"{key}, prompt {index}: expected {wanted}, got {got}"


def _refused(steps: Steps, prompts: list[list[int]]) -> None:
    """What cannot be served is refused, in words that name it."""
    models = steps.work / "models"
    cases: list[tuple[str, Path, dict[str, Any], str]] = []
    damages = [("llama", name, *one) for name, one in _DAMAGES.items()]
    damages.append(
        ("int8", "a scale of int8 rows is not finite", _spoil_head, "lm_head.weight_scale must be")
    )
    for index, (model, damage, change, named) in enumerate(damages):
        path = models / f"damaged-{index}"
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(models / model, path)
        tensors = {name: one.clone() for name, one in load_file(path / "model.safetensors").items()}
        change(tensors)
        save_file(tensors, path / "model.safetensors", {"format": "pt"})
        cases.append((damage, path, {}, named))
    shutil.rmtree(models / "experts", ignore_errors=True)
    make_experts(models / "experts")
    cases.append(("packed experts", models / "experts", {}, "packed experts are not served yet"))
    for model, what in (("int8", "int8 rows"), ("packed-head", "a packed head")):
        refused = f"LoRA adapters beside {what} are not served"
        cases.append((f"adapters beside {what}", models / model, {"enable_lora": True}, refused))
    # That it is refused shows that settings of config.json reach the kernels.
    setting = models / "setting"
    shutil.rmtree(setting, ignore_errors=True)
    shutil.copytree(models / "llama", setting)
    config = json.loads((setting / "config.json").read_text())
    config["quantization_config"]["activation"] = "int4"
    (setting / "config.json").write_text(json.dumps(config))
    cases.append(("an unknown activation", setting, {}, "activation must be one of"))
    jobs = [
        {
            "model": str(path),
            "prompts": prompts[:1],
            "tokens": 1,
            "out": str(steps.work / f"refused-{index}.out.json"),
            "settings": {"enforce_eager": True, **settings},
        }
        for index, (_, path, settings, _) in enumerate(cases)
    ]
    ended: Exception | None = None
    # Experts on their own: vLLM sets up what they need for the first model of a process.
    experts = [case == "packed experts" for case, *_ in cases]
    for name, of_experts in (("refused", False), ("refused-experts", True)):
        some = [job for job, one in zip(jobs, experts, strict=True) if one is of_experts]
        try:
            run_json(steps, "offline.py", some, name)
        except RuntimeError as error:
            ended = error
    for (case, _, _, named), job in zip(cases, jobs, strict=True):
        with steps.step(f"refused: {case}"):
            out = Path(job["out"])
            if not out.exists():
                raise ended or RuntimeError("the run left no result")
            error = json.loads(out.read_text()).get("error", "")
            assert error, "the checkpoint was served"
            assert named in error, f"expected {named} to be named, got {error}"


if __name__ == "__main__":
    sys.exit(main())
