"""SGLang: our checkpoints served by an SGLang that is installed beside this package. See docs/serving.md.

SGLang finds :func:`register` by the entry point group ``sglang.srt.plugins`` and calls it in each of its
processes. It only adds a quantization configuration to SGLang's tables; nothing of SGLang is replaced.
"""

from __future__ import annotations

__all__ = ["register"]


def register() -> None:
    """Make SGLang know the quantization method of our checkpoints; further calls do nothing."""
    # Here, so that what needs no SGLang can be imported without it.
    from sglang.srt.arg_groups.choices import (  # noqa: PLC0415
        QUANTIZATION_CHOICES,
        add_quantization_method_choices,
    )
    from sglang.srt.layers.quantization import (  # noqa: PLC0415
        CPU_QUANTIZATION_METHODS,
        QUANTIZATION_METHODS,
    )

    from .config import METHOD, PackedConfig  # noqa: PLC0415

    # SGLang has no function for this: its own methods stand in the same tables.
    for methods in (QUANTIZATION_METHODS, CPU_QUANTIZATION_METHODS):
        methods.setdefault(METHOD, PackedConfig)
    if METHOD not in QUANTIZATION_CHOICES:
        add_quantization_method_choices([METHOD])
