"""What planning needs to know of a GPU, read from torch or from a table."""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["GPUS", "GpuProperties", "gpu_properties"]


@dataclass(frozen=True)
class GpuProperties:
    """The properties of a GPU that decide how a call is cut up.

    Attributes:
        capability: ``10 * major + minor``, for example 90. AMD's numbers mean other things: an MI300 has 94.
        multiprocessors: streaming multiprocessors.
        shared_bytes: shared memory that one block can have (opt-in).
        warp_lanes: threads of a warp: 32, or the 64 of AMD's data-center GPUs.
        maker: ``"nvidia"`` or ``"amd"``.
    """

    capability: int
    multiprocessors: int
    shared_bytes: int
    warp_lanes: int = 32
    maker: str = "nvidia"

    @property
    def generation(self) -> int:
        """Of NVIDIA's GPUs, the major compute capability; 0 for others."""
        return self.capability // 10 if self.maker == "nvidia" else 0

    def for_cuda(self) -> tuple[int, int, int]:
        """The properties that the CUDA planner takes, in its order."""
        return self.capability, self.multiprocessors, self.shared_bytes


#: GPUs that calls can be planned for by name.
GPUS = {
    "A100": GpuProperties(80, 108, 166912),
    "4090": GpuProperties(89, 128, 101376),
    "H100": GpuProperties(90, 132, 232448),
    "H200": GpuProperties(90, 132, 232448),
    "B200": GpuProperties(100, 148, 232448),
    "5090": GpuProperties(120, 170, 101376),
}


def gpu_properties(gpu: GpuProperties | torch.device | str) -> GpuProperties:
    """Properties of a GPU: as given, by a name of :data:`GPUS`, or those of a device of this machine.

    Raises:
        TypeError: ``gpu`` is none of these.
        ValueError: the name is unknown.
    """
    if isinstance(gpu, GpuProperties):
        return gpu
    if isinstance(gpu, str):
        if gpu not in GPUS:
            raise ValueError(f"gpu must be GpuProperties or one of {', '.join(GPUS)}, got {gpu!r}")
        return GPUS[gpu]
    if not isinstance(gpu, torch.device):
        raise TypeError(f"gpu must be GpuProperties or a name, got {type(gpu).__name__}")
    found = torch.cuda.get_device_properties(gpu)
    # ROCm knows no larger size to opt in to.
    shared_bytes = getattr(found, "shared_memory_per_block_optin", 0) or found.shared_memory_per_block
    capability = 10 * found.major + found.minor
    maker = "nvidia" if torch.version.hip is None else "amd"
    return GpuProperties(capability, found.multi_processor_count, shared_bytes, found.warp_size, maker)
