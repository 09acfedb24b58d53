"""Why the Triton backend cannot run, and what a call of it would do; importing this needs no Triton."""

from __future__ import annotations

import functools
import importlib.util
import os
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..format import LayerShape
from ..gpu import GpuProperties

__all__ = ["TritonLaunch", "interpreting", "no_triton_reason", "plan_triton"]


@dataclass(frozen=True)
class TritonLaunch:
    """One launch of a Triton kernel.

    Attributes:
        kernel: ``"gemv"``, ``"fused"`` (both stages of a GEMV), ``"operand"`` (stages activations for the
            next one), ``"gemm"`` or ``"xnor"``.
        config: its configuration by field name; empty where there is nothing to choose.
    """

    kernel: str
    config: dict[str, int]

    def __str__(self) -> str:
        return ", ".join([self.kernel, *(f"{name} {value}" for name, value in self.config.items())])


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def interpreting() -> bool:
    """Whether Triton's interpreter is asked for, which runs kernels on CPU tensors: right, and very slow."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def no_triton_reason(device_type: str) -> str | None:
    """Why the Triton kernels cannot run on a device type, or ``None``; imports nothing."""
    if not _installed():
        return (
            "triton is not installed; CUDA and ROCm builds of torch for Linux bring it along, else "
            "`pip install 'littlebit2-kernels[triton]'`"
        )
    if device_type == "meta" or (device_type == "cpu" and interpreting()):
        return None
    if device_type != "cuda":
        return (
            f"it runs on tensors of a GPU (or under TRITON_INTERPRET=1 on CPU tensors), not on {device_type}"
        )
    if torch.version.cuda is None and torch.version.hip is None:
        return (
            f"this torch ({torch.__version__}) was built without CUDA or ROCm; install a build that has one"
        )
    if not torch.cuda.is_available():
        return "torch finds no usable GPU or driver"
    return None


# torch.compile takes the answer of trace time. This is what torch.compiler.assume_constant_result marks a
# function with; calling that would import the compiler.
no_triton_reason._dynamo_marked_constant = True  # type: ignore[attr-defined]


def plan_triton(
    shape: LayerShape, tokens: int, dtype: torch.dtype, activation: str, gpu: GpuProperties | torch.device
) -> dict[str, Any]:
    """What a call would do on ``gpu``: properties, or a device, whose tuned configurations are used.

    Returns:
        ``activation`` (resolved), ``kernels`` (the name of the one that multiplies) and ``launches``.
    """
    from . import configs, plan

    method = plan.choose_method(tokens, activation, dtype == torch.float32)
    own, paths, k = shape.own_rows, shape.num_paths, shape.in_features
    first = None if shape.ranks is None else plan.StageShape(own, (k,) * len(own), last=False)
    cols = (k,) * paths if shape.ranks is None else shape.ranks
    last = plan.StageShape((shape.out_features,) * paths, cols, last=True)
    properties, lookup = configs.for_device(gpu)
    launches = plan.layer_launches(method, first, last, tokens, properties, lookup)
    return {
        "kernels": launches[-1][0],
        "activation": method.activation,
        "gpu": properties,
        "first_stages": 1 if first is None else len(own),
        "launches": [
            TritonLaunch(kernel, {} if config is None else asdict(config)) for kernel, config in launches
        ],
    }
