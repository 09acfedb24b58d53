"""What the predictions assume of the GPUs."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["LAUNCH", "PEER_RATE", "RATES", "Rates", "rates_of"]

#: Assumed seconds from the end of a kernel to the start of the next one in a graph, and to a chained one's.
LAUNCH, CHAINED_LAUNCH = 1.0e-6, 0.3e-6
#: cuBLAS is modeled at this share of the nominal tensor-core rate; host time is ignored.
PEER_RATE = 0.7


@dataclass(frozen=True)
class Rates:
    """Clock in Hz, bytes per second from memory, and nominal float16 FLOP per second (dense, fp32 sums)."""

    clock: float
    memory: float
    tensor: float

    def seconds(self, *, chained: bool, nbytes: float, cycles: float = 0.0) -> float:
        """Predicted seconds of a launch: its start, plus the longer of its cycles and its memory traffic."""
        start = CHAINED_LAUNCH if chained else LAUNCH
        return start + max(cycles / self.clock, nbytes / self.memory)


#: By the names of :data:`littlebit2_kernels.gpu.GPUS`: clock, memory, tensor cores.
RATES = {
    "A100": Rates(1.41e9, 0.9 * 2.04e12, 312e12),
    "4090": Rates(2.52e9, 0.9 * 1.01e12, 165e12),
    "H100": Rates(1.98e9, 0.9 * 3.35e12, 989e12),
    "H200": Rates(1.98e9, 0.9 * 4.8e12, 989e12),
}


def rates_of(gpu: str) -> Rates:
    """The rates of a GPU.

    Raises:
        ValueError: the GPU is unknown.
    """
    if gpu not in RATES:
        raise ValueError(f"gpu must be one of {', '.join(RATES)}, got {gpu!r}")
    return RATES[gpu]
