"""What a run consists of: its layers with their settings, and the fingerprint that no two runs share."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from littlebit2.checkpoint import Checkpoint
from littlebit2.quantize import QuantConfig, is_partial, layer_config, planned_stored_bpw
from littlebit2_kernels.version import __version__

from .select import LayerSource, select_layers

__all__ = ["Job", "make_jobs", "run_settings", "source_digest"]

#: Entries of a tensor that its digest looks at, at the beginning, in the middle and at the end.
_SAMPLE = 1024


@dataclass(frozen=True)
class Job:
    """One layer to quantise.

    Attributes:
        index: position in the run.
        source: where its weight lies.
        config: with ranks and seed settled.
    """

    index: int
    source: LayerSource
    config: QuantConfig

    @property
    def weights(self) -> int:
        """Number of weights, N K."""
        return self.source.in_features * self.source.out_features

    @property
    def cost(self) -> float:
        """How long the layer takes, relative to others: its decomposition."""
        return float(self.weights * min(self.source.in_features, self.source.out_features))

    @property
    def stored_bytes(self) -> int:
        """Bytes of the packed layer, bias excluded."""
        assert self.config.ranks is not None
        k, n = self.source.in_features, self.source.out_features
        return int(planned_stored_bpw(k, n, self.config.ranks) * self.weights / 8)

    @property
    def working_bytes(self) -> int:
        """About how much memory the layer takes while it is quantised (stated in docs/checkpoints.md)."""
        assert self.config.ranks is not None
        k, n, rank = self.source.in_features, self.source.out_features, max(self.config.ranks)
        whole = not is_partial(n, k, rank, self.config.compute_dtype)
        # Weight and normalised copy, factors with a second basis, systems of the rank in float64;
        # where the matrix is decomposed whole also the Gram matrix, LAPACK's workspace and float64 factors.
        lean = 8 * k * n + 10 * rank * (k + n) + 40 * rank**2
        return lean + (40 * min(k, n) ** 2 + 32 * rank * (k + n) if whole else 0)


def make_jobs(
    checkpoint: Checkpoint, config: QuantConfig, include: Sequence[str], exclude: Sequence[str]
) -> list[Job]:
    """Select the layers and settle the ranks of all of them, so that a budget that does not fit fails early.

    Raises:
        ValueError: as :func:`.select_layers`, or the budget does not fit a layer (the message names it).
    """
    sources = select_layers(checkpoint.dense, checkpoint.config, include=include, exclude=exclude)
    return [
        Job(index, s, layer_config(s.name, s.in_features, s.out_features, config))
        for index, s in enumerate(sources)
    ]


def source_digest(checkpoint: Checkpoint) -> str:
    """Return a digest of the source: its configuration, every tensor's name, shape, dtype and sampled values.

    It does not depend on where the files lie or when they were written, and does not read them whole.
    """
    digest = hashlib.sha256(json.dumps(checkpoint.config, sort_keys=True).encode())
    for name, (shape, dtype) in checkpoint.dense.items():
        digest.update(f"{name} {list(shape)} {dtype}\n".encode())
        flat = checkpoint.load_tensor(name).flatten()
        middle = max(flat.numel() // 2 - _SAMPLE // 2, 0)
        for part in (flat[:_SAMPLE], flat[middle : middle + _SAMPLE], flat[-_SAMPLE:]):
            digest.update(part.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def run_settings(
    checkpoint: Checkpoint,
    config: QuantConfig,
    include: Sequence[str],
    exclude: Sequence[str],
    *,
    device: str,
    threads: int,
) -> dict[str, Any]:
    """Return everything that the bytes of the result depend on, as JSON values by name."""
    quant = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in asdict(config).items()
        if name != "compute_dtype"
    }
    return {
        **quant,
        "compute_dtype": str(config.compute_dtype).removeprefix("torch."),
        "include": list(include),
        "exclude": list(exclude),
        "device": device,
        "threads": threads,
        "littlebit2": __version__,
        "torch": torch.__version__,
        "source": source_digest(checkpoint),
    }
