"""How large the machine's caches are, and how many bytes no cache holds."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["default_cold_bytes", "last_level_cache"]


def last_level_cache(folder: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> int | None:
    """Bytes of the largest cache of the first processor, where the system tells them."""
    sizes = []
    for path in folder.glob("index*/size"):
        match = re.fullmatch(r"(\d+)([KM]?)", path.read_text("utf-8").strip())
        if match:
            sizes.append(int(match[1]) * {"": 1, "K": 2**10, "M": 2**20}[match[2]])
    return max(sizes, default=None)


def default_cold_bytes(device: torch.device) -> int:
    """Bytes of all copies of a cold candidate together: 8 times the last cache, at least 256 MiB."""
    if device.type == "cuda":
        import torch

        cache: int | None = int(torch.cuda.get_device_properties(device).L2_cache_size)
    else:
        cache = last_level_cache()
    return max(2**28, 8 * (cache or 0))
