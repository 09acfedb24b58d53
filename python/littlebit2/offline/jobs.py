"""What a run consists of: its layers with their settings, and the fingerprint that no two runs share."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from littlebit2.architecture.tensors import LayerSource
from littlebit2.checkpoint import DenseCheckpoint
from littlebit2.quantize import Importance, QuantConfig
from littlebit2.quantize.allocate import RankAllocation
from littlebit2.quantize.importance import importance_tensors
from littlebit2.quantize.memory import working_bytes
from littlebit2.quantize.ranks import check_budget, layer_config, needs_spectra
from littlebit2_kernels.format import RANK_MULTIPLE, LayerShape
from littlebit2_kernels.version import __version__

__all__ = ["Job", "importance_digest", "make_jobs", "run_settings", "source_digest", "with_allocation"]

#: Files of a source that are read at a time for its digest: one thread hashes slower than a disk reads.
_READERS = 4


@dataclass(frozen=True)
class Job:
    """One layer to quantize.

    Attributes:
        index: position in the run.
        source: where its weight lies.
        config: with ranks and seed settled.
        predicted_error: where the ranks come from the spectra.
    """

    index: int
    source: LayerSource
    config: QuantConfig
    predicted_error: float | None = None

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
        return LayerShape(k, n, self.config.ranks).stored_bits // 8

    @property
    def working_bytes(self) -> int:
        """About how much memory the layer takes while it is quantized (stated in docs/checkpoints.md)."""
        assert self.config.ranks is not None
        return working_bytes(self.source.in_features, self.source.out_features, self.config)


def make_jobs(sources: Sequence[LayerSource], config: QuantConfig) -> list[Job]:
    """Settle the ranks of all layers, so that a budget that does not fit fails early.

    Where the ranks depend on spectra, they are for now the uniform or the least ones: see
    :func:`with_allocation`.

    Raises:
        ValueError: the budget does not fit a layer (the message names it) or is more than any layer can use.
    """
    check_budget(config, ((s.name, s.in_features, s.out_features) for s in sources))
    if config.energy is not None:
        assert config.paths is not None  # set by QuantConfig
        config = replace(config, energy=None, ranks=(RANK_MULTIPLE,) * config.paths)
    elif needs_spectra(config):
        config = replace(config, budget="uniform")
    return [
        Job(index, s, layer_config(s.name, s.in_features, s.out_features, config))
        for index, s in enumerate(sources)
    ]


def with_allocation(
    jobs: Sequence[Job], config: QuantConfig, allocation: Mapping[str, RankAllocation]
) -> list[Job]:
    """Return the jobs with the ranks that the spectra of their weights have led to."""
    return [
        replace(
            job,
            config=layer_config(
                job.source.name, job.source.in_features, job.source.out_features, config, settled
            ),
            predicted_error=settled.predicted_error,
        )
        for job in jobs
        for settled in [allocation[job.source.name]]
    ]


def source_digest(checkpoint: DenseCheckpoint) -> str:
    """Return a digest of the source: its configuration, and every byte of its weight files, by name.

    It does not depend on where the files lie or when they were written.

    Raises:
        OSError: a file cannot be read.
    """
    digest = hashlib.sha256(json.dumps(checkpoint.config, sort_keys=True).encode())
    files = checkpoint.weight_files
    with ThreadPoolExecutor(_READERS) as pool:
        for file, content in zip(files, pool.map(_file_digest, files), strict=True):
            digest.update(f"{file.name} {content}\n".encode())
    return digest.hexdigest()


def _file_digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def run_settings(
    checkpoint: DenseCheckpoint,
    config: QuantConfig,
    include: Sequence[str],
    exclude: Sequence[str],
    importance: Mapping[str, Importance] | None,
    *,
    head: str,
    embedding: str,
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
        "head": head,
        "embedding": embedding,
        "importance": None if importance is None else importance_digest(importance),
        "device": device,
        "threads": threads,
        "littlebit2": __version__,
        "torch": torch.__version__,
        "source": source_digest(checkpoint),
    }


def importance_digest(importance: Mapping[str, Importance]) -> str:
    """Return a digest of all names and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(importance_tensors(importance).items()):
        digest.update(f"{name} {list(tensor.shape)}\n".encode())
        digest.update(tensor.double().numpy().tobytes())
    return digest.hexdigest()
