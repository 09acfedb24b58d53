"""How many signs change: the measure of what training does to the packed bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from littlebit2_kernels.packing import pack_signs

__all__ = ["FlipMeter"]


class FlipMeter:
    """Counts the latents whose sign differs from the start, and from the last reading.

    Signs are remembered packed: two bits for each latent. Latents are looked at as they lie in this process,
    so that shards of a distributed model are counted where they are; the counts add up over processes, and
    :meth:`state_dict` is each process's own.

    Args:
        latents: by name; the signs they have now are the start.
    """

    def __init__(self, latents: Mapping[str, torch.Tensor]) -> None:
        self._start = {name: _words(latent) for name, latent in latents.items()}
        self._last = dict(self._start)

    def read(self, latents: Mapping[str, torch.Tensor]) -> tuple[int, int, int]:
        """Return how many signs differ from the last reading, how many from the start, and of how many.

        The reading becomes the last one.

        Raises:
            KeyError: a latent is not among those of the start.
            ValueError: a latent is NaN.
        """
        recent = total = count = 0
        for name, latent in latents.items():
            words = _words(latent)
            recent += _differing(words, self._last[name])
            total += _differing(words, self._start[name])
            count += _local(latent).numel()
            self._last[name] = words
        return recent, total, count

    def state_dict(self) -> dict[str, Any]:
        """Return what :meth:`load_state_dict` takes."""
        return {"start": dict(self._start), "last": dict(self._last)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state``.

        Raises:
            ValueError: it is of other latents.
        """
        expected = {name: words.shape for name, words in self._start.items()}
        for key in ("start", "last"):
            if {name: words.shape for name, words in state[key].items()} != expected:
                raise ValueError("state must be of the same latents, got other names or shapes")
        self._start, self._last = dict(state["start"]), dict(state["last"])


def _local(latent: torch.Tensor) -> torch.Tensor:
    """This process's part of a distributed tensor, or the tensor."""
    to_local = getattr(latent, "to_local", None)
    return (to_local() if callable(to_local) else latent).detach()


def _words(latent: torch.Tensor) -> torch.Tensor:
    return pack_signs(_local(latent).reshape(1, -1)).cpu()


def _differing(one: torch.Tensor, other: torch.Tensor) -> int:
    changed = (one ^ other).view(torch.uint8)
    return int(_POPCOUNT[changed.int()].sum())


_POPCOUNT = torch.tensor([bin(byte).count("1") for byte in range(256)], dtype=torch.int64)
