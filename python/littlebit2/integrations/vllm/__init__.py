"""vLLM: our checkpoints served by a vLLM that is installed beside this package. See docs/serving.md.

vLLM finds :func:`register` by the entry point group ``vllm.general_plugins`` and calls it in each of its
processes. It only registers a quantization configuration; nothing of vLLM is replaced.
"""

from __future__ import annotations

__all__ = ["register"]


def register() -> None:
    """Make vLLM know the quantization method of our checkpoints; further calls do nothing."""
    # Here, so that what needs no vLLM can be imported without it.
    from vllm.model_executor.layers.quantization import (  # noqa: PLC0415
        QUANTIZATION_METHODS,
        register_quantization_config,
    )

    from .config import METHOD, PackedConfig  # noqa: PLC0415

    if METHOD not in QUANTIZATION_METHODS:
        register_quantization_config(METHOD)(PackedConfig)
