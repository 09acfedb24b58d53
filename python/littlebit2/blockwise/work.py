"""The work folder of a block-by-block run: finished layers and blocks, hidden states between blocks."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save

from littlebit2.disk import read_json, sync, sync_tree, write_file, write_json
from littlebit2.offline.jobs import Job
from littlebit2.offline.work import WorkDirectory, keep_layers

from .tuning.block import BlockResult
from .tuning.distill import Distilled
from .tuning.saved import SavedState

__all__ = ["DISTILL_STEPS", "KEEP_LATENTS", "PRECISION", "SAMPLES", "STEPS", "BlockwiseWork"]

#: What a run has chosen: to fit a time, and by measurement.
SAMPLES, STEPS, DISTILL_STEPS, PRECISION = "samples", "steps", "distill_steps", "precision"
_CHOSEN = "chosen.json"
_DISTILL = "distill_"
#: Of the run: whether the result holds the latents' magnitudes.
KEEP_LATENTS = "keep_latents"
_ENTRY = "littlebit2"


class BlockwiseWork(WorkDirectory):
    """Adds blocks to the folder of finished layers.

    A block is finished once its own file is there, which is written last: after its layers and the hidden
    states that it hands on. Those that it got are removed then.

    Finished blocks do not depend on how the whole model is distilled afterwards: a run that differs in that
    alone goes on from them.
    """

    @property
    def of_layers(self) -> dict[str, Any]:
        """The settings that finished layers depend on."""
        settings = self.wanted["blockwise"]
        # With minutes for everything, the blocks get what the distillation leaves.
        kept = {
            name: value
            for name, value in settings.items()
            if settings["minutes"] is not None or not name.startswith(_DISTILL)
        }
        others = {name: value for name, value in self.wanted.items() if name != KEEP_LATENTS}
        return {**others, "blockwise": kept}

    def open(self, *, resume: bool) -> None:
        """Make the directory or continue in it, as :meth:`.WorkDirectory.open`."""
        super().open(resume=resume)
        settings = self.wanted["blockwise"]
        wanted = {name: value for name, value in settings.items() if name.startswith(_DISTILL)}
        if read_json(self.path / "distillation.json") == wanted:
            return
        shutil.rmtree(self._distilled, ignore_errors=True)
        self.distillation.remove()
        if DISTILL_STEPS in self.chosen():
            self.choose({DISTILL_STEPS: None})
        write_json(self.path / "distillation.json", wanted)

    @property
    def tokens(self) -> Path:
        """Where the tokens of the text lie."""
        return self.path / "tokens"

    def chosen(self) -> dict[str, Any]:
        """Return what this call and earlier ones have chosen, by name."""
        return read_json(self.path / _CHOSEN) or {}

    def choose(self, values: Mapping[str, Any]) -> None:
        """Keep what was chosen: a run that goes on must not choose anew. ``None`` forgets it."""
        known = {**self.chosen(), **values}
        write_json(self.path / _CHOSEN, {name: value for name, value in known.items() if value is not None})

    def ranks(self) -> dict[str, Any] | None:
        """Return what :meth:`keep_ranks` kept, ``None`` if it was not called yet."""
        found: dict[str, Any] | None = read_json(self.path / "ranks.json")
        return found

    def keep_ranks(self, found: dict[str, Any]) -> None:
        """Keep ranks and how they came about."""
        with keep_layers():
            write_json(self.path / "ranks.json", found)

    @property
    def trials(self) -> Path:
        """Where the hidden states lie while ranks are tried."""
        return self.path / "trials.states"

    def states(self, kind: str, index: int) -> Path:
        """Where the hidden states before a block lie; before the first one both kinds are the same."""
        return self.path / (f"{kind}-{index:04d}.states" if index else "embedded.states")

    def write_sensitivity(self, squares: Sequence[torch.Tensor]) -> None:
        """Keep what the model's output feels of the channels ``[D]`` of every block's output."""
        tensors = {str(index): one.cpu().contiguous() for index, one in enumerate(squares)}
        with keep_layers():
            write_file(self._sensitivity, save(tensors))

    def sensitivity(self) -> list[torch.Tensor] | None:
        """Return what :meth:`write_sensitivity` kept, ``None`` if it was not called yet."""
        if not self._sensitivity.is_file():
            return None
        found = load_file(self._sensitivity)
        return [found[str(index)] for index in range(len(found))]

    @property
    def _sensitivity(self) -> Path:
        return self.path / "channels.sensitivity"

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
            write_file(self.path / _latents(index), save(result.latents))
            write_file(self.block_path(index), save(result.changed, metadata))
        return line

    def latents(self, index: int) -> dict[str, torch.Tensor]:
        """Return how far the latents of a tuned block are from flipping, see :func:`.magnitudes`."""
        return load_file(self.path / _latents(index))

    def latents_path(self, index: int) -> Path:
        """Where they lie in a file: those of the distillation once it is finished."""
        return (self._distilled if self._distilled.is_dir() else self.path) / _latents(index)

    def layer_path(self, job: Job) -> Path:
        """Where the file of a finished layer lies: that of the distillation once it is finished."""
        path = super().layer_path(job)
        return self._distilled / path.name if self._distilled.is_dir() else path

    @property
    def _distilled(self) -> Path:
        return self.path / "distilled"

    @property
    def distillation(self) -> SavedState:
        """Where the state of an unfinished distillation is kept."""
        return SavedState(self.path / "distillation.state")

    def write_distilled(self, result: Distilled, entry: dict[str, Any]) -> None:
        """Keep what the distillation made: the folder appears whole.

        Args:
            result: of the distillation.
            entry: of the report.
        """
        folder = self.path / "distilled.new"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for path in sorted(self.path.glob("[0-9]*.safetensors")):
            shutil.copyfile(path, folder / path.name)
        with keep_layers():
            for job, packed, errors in result.layers:
                found = self.finished(job)
                assert found is not None  # its block was finished
                self.write_layer_to(
                    folder / super().layer_path(job).name, job, packed, {**found[0], **errors}, found[1]
                )
            for index, values in enumerate(result.latents):
                write_file(folder / _latents(index), save(values))
            write_file(folder / "changed.safetensors", save(result.changed, {_ENTRY: json.dumps(entry)}))
            sync_tree(folder)
            folder.replace(self._distilled)
            sync(self.path)
        self.distillation.remove()

    def distilled(self) -> tuple[dict[str, Any], Mapping[str, torch.Tensor]] | None:
        """Return entry and changed tensors of a finished distillation, ``None`` if there is none."""
        path = self._distilled / "changed.safetensors"
        if not path.is_file():
            return None
        with safe_open(path, "pt") as file:
            entry = json.loads((file.metadata() or {})[_ENTRY])
            return entry, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118

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


def _latents(index: int) -> str:
    return f"latents-{index:04d}.safetensors"
