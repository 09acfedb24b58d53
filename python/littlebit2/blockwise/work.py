"""The work folder of a block-by-block run: finished layers and blocks, hidden states between blocks."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from littlebit2.disk import write_file
from littlebit2.offline.jobs import Job
from littlebit2.offline.work import WorkDirectory, keep_layers

from .block import BlockResult

__all__ = ["BlockwiseWork"]

_ENTRY = "littlebit2"


class BlockwiseWork(WorkDirectory):
    """Adds blocks to the folder of finished layers.

    A block is finished once its own file is there, which is written last: after its layers and the hidden
    states that it hands on. Those that it got are removed then.
    """

    @property
    def tokens(self) -> Path:
        """Where the tokens of the text lie."""
        return self.path / "tokens"

    def states(self, kind: str, index: int) -> Path:
        """Where the hidden states before a block lie; before the first one both kinds are the same."""
        return self.path / (f"{kind}-{index:04d}.states" if index else "embedded.states")

    def block_path(self, index: int) -> Path:
        """Where the file of a finished block lies."""
        return self.path / f"block-{index:04d}.safetensors"

    def write_block(self, index: int, result: BlockResult) -> dict[str, Any]:
        """Write the layers of a block and, last, the block itself; return its entry of the report."""
        seconds = sum(result.seconds.values())
        for job, packed, entry in result.layers:
            self.write_layer(job, packed, entry, seconds / len(result.layers))
        line = {
            "index": index,
            "layers": len(result.layers),
            "before": result.tuned.before,
            "after": result.tuned.after,
            "steps": result.tuned.steps,
        }
        metadata = {_ENTRY: json.dumps({"entry": line, "seconds": result.seconds})}
        with keep_layers():
            write_file(self.block_path(index), save(result.changed, metadata))
        return line

    def finished_block(
        self, index: int, jobs: Sequence[Job]
    ) -> tuple[dict[str, Any], dict[str, float], Mapping[str, torch.Tensor]] | None:
        """Return entry, seconds and changed tensors of a finished block, ``None`` if it is to be done."""
        try:
            with safe_open(self.block_path(index), "pt") as file:
                content = json.loads((file.metadata() or {})[_ENTRY])
                changed = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, KeyError, TypeError, json.JSONDecodeError):
            return None
        if any(self.finished(job) is None for job in jobs):
            return None
        return content["entry"], content["seconds"], changed

    def drop_states(self, index: int) -> None:
        """Remove the hidden states before a block."""
        for kind in ("dense", "quantized"):
            self.states(kind, index).unlink(missing_ok=True)
