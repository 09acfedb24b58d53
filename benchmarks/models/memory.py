"""Memory of this process, or allocations on a GPU, while a model is made."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

__all__ = ["Memory", "MemoryWatch"]


@dataclass(frozen=True)
class Memory:
    """Bytes that are resident in this process, or allocated on the GPU.

    Attributes:
        before: before the model.
        after: with the model, after it decoded.
        peak: the most in between, or ``None`` where the system does not report it.
    """

    before: int
    after: int
    peak: int | None

    @property
    def growth(self) -> int:
        """What the model added."""
        return self.after - self.before


class MemoryWatch:
    """Watches from now on.

    Args:
        device: a GPU, or the CPU for the resident memory of this process.

    Attributes:
        before: bytes now, or ``None`` where the system does not report it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.before = self._now()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._peaks = True
        else:
            self._peaks = _reset_peak()

    def _now(self) -> int | None:
        if self._device.type == "cuda":
            return torch.cuda.memory_allocated(self._device)
        return _status_bytes("VmRSS")

    def read(self) -> Memory | None:
        """What was used since, or ``None`` where the system does not report it."""
        after = self._now()
        if self.before is None or after is None:
            return None
        if self._device.type == "cuda":
            return Memory(self.before, after, torch.cuda.max_memory_allocated(self._device))
        return Memory(self.before, after, _status_bytes("VmHWM") if self._peaks else None)


def _status_bytes(key: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    except OSError:
        return None
    for line in lines:
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0]) * 1024
    return None


def _reset_peak() -> bool:
    try:
        # Linux: 5 sets the peak of the resident memory to what is resident now.
        Path("/proc/self/clear_refs").write_text("5", "utf-8")
    except OSError:
        return False
    return True
