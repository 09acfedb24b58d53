"""Activations of a model on local text: the file by which ``littlebit2 quantize --importance`` weighs errors.

Text is read, tokenized and cut into blocks as it is needed; memory holds the model, one block of text and one
vector for each side of each linear layer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from .architecture.select import DEFAULT_EXCLUDE
from .checkpoint import open_dense
from .dense_model import architecture_of, load_dense
from .disk import check_new_file
from .offline.choice import candidates
from .quantize import Importance, collect_importance, save_importance
from .quantize.device import check_device
from .train.data import find_files, read_texts

__all__ = ["Calibration", "calibrate"]

_BLOCK = 512


@dataclass(frozen=True)
class Calibration:
    """What :func:`calibrate` did.

    Attributes:
        layers: names of the linear layers that were measured, as in the checkpoint.
        missing: linear layers of the checkpoint that no token reached.
        tokens: that were run.
        seconds: that it took, loading included.
    """

    layers: tuple[str, ...]
    missing: tuple[str, ...]
    tokens: int
    seconds: float


def calibrate(
    model_dir: str | Path,
    data: Sequence[str | Path],
    out: str | Path,
    *,
    tokens: int = 65536,
    block: int | None = None,
    gradients: bool = False,
    text_field: str = "text",
    device: str = "cpu",
    dtype: str | None = None,
    progress: bool = True,
    overwrite: bool = False,
) -> Calibration:
    """Run a dense transformers model on text and write the importance of its linear layers' inputs.

    Args:
        model_dir: directory of the dense checkpoint, with a tokenizer. Nothing is downloaded, no code of the
            checkpoint is run.
        data: files or directories of text, JSON lines, Parquet or Arrow, see :func:`.find_files`.
        out: safetensors file to write; it appears whole.
        tokens: most tokens to run.
        block: tokens in a sequence; by default 512, or what the model takes if that is less.
        gradients: also measure the gradient of the language-modeling loss at each layer's outputs, by which
            ``budget="spectral"`` knows what a layer is worth. Takes about as much memory again as the model.
        text_field: name of the text in JSON lines and tables.
        device: to run on.
        dtype: of the model, such as ``"float32"``; by default as stored.
        progress: whether to show a progress bar, where stderr is a terminal.
        overwrite: whether ``out`` may be a file, which is replaced at the end.

    Raises:
        FileExistsError: ``out`` exists, and ``overwrite`` is off or it is no file.
        FileNotFoundError: there is no such model or text.
        ImportError: transformers is not installed, or pyarrow, which a table needs.
        OSError: a file cannot be read or written.
        ValueError: the checkpoint is not dense or does not name its architecture, there is no tokenizer, the
            text is malformed or too short, ``gradients`` with a model that has no language-modeling loss,
            ``device`` cannot be used, or a number is out of its range.
        RuntimeError: an activation is NaN or infinite; the message names the layer.
    """
    start = time.perf_counter()
    for name, value in (("tokens", tokens), ("block", _BLOCK if block is None else block)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 2:
            raise ValueError(f"{name} must be an integer of at least 2, got {value!r}")
    target = Path(out)
    if not target.absolute().parent.is_dir():
        raise FileNotFoundError(f"{target.absolute().parent}: is no directory to write {target.name} to")
    check_new_file(target, overwrite=overwrite)
    place = check_device(device)
    texts = (text for text, _ in read_texts(find_files(data), text_field))
    names, architecture = _linear_names(Path(model_dir))
    model, tokenizer = load_dense(Path(model_dir), architecture, place, dtype)
    if gradients and not architecture.endswith("ForCausalLM"):
        raise ValueError(f"gradients needs a causal language model, got {architecture}")
    size = _block_size(block, getattr(model.config, "max_position_embeddings", None))
    count = 0

    def batches() -> Iterator[dict[str, torch.Tensor]]:
        nonlocal count
        with tqdm(total=tokens, desc="calibrate", unit=" tokens", disable=None if progress else True) as bar:
            for ids in _blocks(texts, tokenizer, size, tokens):
                batch = {"input_ids": torch.tensor([ids], device=place)}
                batch["attention_mask"] = torch.ones_like(batch["input_ids"])
                yield {**batch, "labels": batch["input_ids"]} if gradients else batch
                count += len(ids)
                bar.update(len(ids))

    loss: Callable[[Any], torch.Tensor] | None = (lambda output: output.loss) if gradients else None
    stream = batches()
    first = next(stream, None)
    if first is None:
        raise ValueError(f"data must hold at least 2 tokens of text, got none in {_listed(data)}")
    found = collect_importance(model, chain([first], stream), loss=loss)
    matched = _matched(found, names, getattr(model, "base_model_prefix", ""))
    for name, one in matched.items():
        for side in (one.inputs, one.outputs):
            if side is not None and not bool(torch.isfinite(side).all()):
                raise RuntimeError(f"layer {name!r}: activations must be finite; dtype='float32' may help")
    save_importance(target, matched)
    missing = tuple(name for name in names.values() if name not in matched)
    return Calibration(tuple(matched), missing, count, time.perf_counter() - start)


def _blocks(texts: Iterable[str], tokenizer: Any, block: int, tokens: int) -> Iterator[list[int]]:
    """Yield blocks of token ids, the texts one after the other; the last block may be shorter."""
    left = tokens
    waiting: list[int] = []
    for text in texts:
        waiting += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        at = 0
        while len(waiting) - at >= block and left >= 2:
            ids = waiting[at : at + min(block, left)]
            yield ids
            at, left = at + len(ids), left - len(ids)
        del waiting[:at]
        if left < 2:
            return
    ids = waiting[: min(block, left)]
    if len(ids) >= 2:  # a single token predicts nothing
        yield ids


def _linear_names(model_dir: Path) -> tuple[dict[str, str], str]:
    """Return the layers that would be quantized, by their name in the model, and the class of the model."""
    with open_dense(model_dir, name="model_dir") as checkpoint:
        layers, _ = candidates(checkpoint, include=("*",), exclude=DEFAULT_EXCLUDE)
        architecture = architecture_of(checkpoint)
    return {layer.module or layer.name: layer.name for layer in layers}, architecture


def _matched(found: Mapping[str, Importance], names: Mapping[str, str], prefix: str) -> dict[str, Importance]:
    """Return the importances by the names of the checkpoint.

    Args:
        found: by the names of the model that ran.
        names: names in the checkpoint by names in the model, with or without the prefix.
        prefix: of the base model.
    """
    matched = {}
    for name, one in found.items():
        for candidate in (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}.")):
            if candidate in names:
                matched[names[candidate]] = one
                break
    if not matched:
        raise ValueError(
            f"the model must call a linear layer of the checkpoint, such as {next(iter(names))!r}, got "
            f"{list(islice(found, 3))}"
        )
    return {name: matched[name] for name in names.values() if name in matched}


def _block_size(block: int | None, longest: object) -> int:
    most = longest if isinstance(longest, int) and longest > 0 else None
    if block is None:
        return _BLOCK if most is None else min(_BLOCK, most)
    if most is not None and block > most:
        raise ValueError(f"block must be at most the model's max_position_embeddings = {most}, got {block}")
    return block


def _listed(data: Sequence[str | Path]) -> str:
    return ", ".join(map(str, data))
