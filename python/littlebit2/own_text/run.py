"""The file of text: drawn batch by batch, each kept as it is finished."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from littlebit2.architecture.names import is_causal_name
from littlebit2.blockwise.text import fitting_length
from littlebit2.blockwise.tuning.precision import resolve_precision
from littlebit2.checkpoint import open_dense
from littlebit2.dense_model import architecture_of, load_dense
from littlebit2.disk import RunDirectory, read_json, write_file, write_json
from littlebit2.offline.jobs import source_digest
from littlebit2.offline.work import difference
from littlebit2.quantize.device import check_device

from .chats import ChatForm
from .record import check_target, finished_counts, write_record
from .writer import Writer

__all__ = ["WrittenText", "write_text"]

#: Without another wish, half of the tokens are chats where the tokenizer has a template for them.
_CHATS = 0.5
_SUFFIX = ".jsonl"
#: Of the work folder: the dtype that was measured to be the fastest.
_DTYPE = "dtype.json"
#: Batches without a token after which a run ends.
_EMPTY = 8


@dataclass(frozen=True)
class WrittenText:
    """What :func:`write_text` did.

    Attributes:
        texts: lines of the file.
        chats: of them.
        tokens: of all texts.
        seconds: that it took, loading included.
        was_there: whether it had been finished before, with the same arguments.
    """

    texts: int
    chats: int
    tokens: int
    seconds: float
    was_there: bool = False


def write_text(
    model_dir: str | Path,
    out: str | Path,
    *,
    tokens: int = 1 << 18,
    length: int = 256,
    chats: float | None = None,
    batch_size: int = 32,
    temperature: float = 1.0,
    top_k: int = 50,
    seed: int = 0,
    device: str = "cpu",
    dtype: str | None = None,
    progress: bool = True,
    resume: bool = True,
    overwrite: bool = False,
) -> WrittenText:
    """Let a dense language model write the text that its quantization is tuned on.

    ``out`` is JSON lines with a ``text`` each: free texts, and chats in the form of the tokenizer's
    template. Killed at any moment, the same call goes on after the last finished batch, and the bytes of
    ``out`` are the same; once it is finished, the call leaves it as it is. ``<out>.report.json`` holds what
    it was written with.

    Args:
        model_dir: directory of a dense checkpoint of a causal language model, with a tokenizer. Nothing is
            downloaded, no code of the checkpoint is run.
        out: file to write, named ``*.jsonl``; it appears whole.
        tokens: to write at least; a run that goes on from another one has as many.
        length: tokens of a text at most.
        chats: share of the tokens in chats, 0 to 1; by default a half where there is a chat template.
        batch_size: texts at a time.
        temperature: sampling temperature.
        top_k: likeliest tokens that are drawn from; 0: all.
        seed: seed for sampling.
        device: to run on.
        dtype: of the model, such as ``"float32"``; by default bfloat16 where its products are measured to be
            faster. A run that goes on keeps what it measured.
        progress: whether to show a bar, where stderr is a terminal.
        resume: continue an interrupted run, or keep a finished one; otherwise they are discarded.
        overwrite: whether ``out`` may be a file, which is replaced at the end.

    Raises:
        FileExistsError: ``out`` exists and is not what the same call has written, and ``overwrite`` is off
            or it is no file.
        FileNotFoundError: there is no such model.
        ImportError: transformers is not installed.
        RunError: the work folder ``<out>.partial`` is in use, or belongs to a run with other arguments.
        ValueError: the checkpoint is not dense or no causal language model, there is no tokenizer or no chat
            template, or an argument is out of its range.
    """
    start = time.perf_counter()
    least = {"tokens": (tokens, 1), "length": (length, 8), "batch_size": (batch_size, 1)}
    least |= {"top_k": (top_k, 0), "seed": (seed, 0)}
    for name, (value, smallest) in least.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < smallest:
            raise ValueError(f"{name} must be an integer of at least {smallest}, got {value!r}")
    if chats is not None and not 0 <= chats <= 1:
        raise ValueError(f"chats must be in [0, 1], got {chats!r}")
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be positive and finite, got {temperature!r}")
    target = Path(os.path.abspath(out))
    if target.suffix != _SUFFIX:
        raise ValueError(f"out must be named *{_SUFFIX}, got {target.name!r}")
    check_target(target, overwrite=overwrite, resume=resume)
    place = check_device(device)
    with open_dense(model_dir, name="model_dir") as checkpoint:
        architecture = architecture_of(checkpoint)
        source = source_digest(checkpoint)
    if not is_causal_name(architecture):
        raise ValueError(f"model_dir must hold a causal language model, got {architecture}")
    work = RunDirectory(target.with_name(f"{target.name}.partial"))
    # Not yet held: where it is another run's, it is refused below, and started anew it is not asked.
    measured = read_json(work.path / _DTYPE) if resume and not dtype and work.settings() else None
    dtype_here: str = dtype or measured or resolve_precision("auto", place)
    model, tokenizer = load_dense(Path(model_dir), architecture, place, dtype_here)
    length = fitting_length(length, model.config)
    templated = bool(getattr(tokenizer, "chat_template", None))
    share = chats if chats is not None else _CHATS * templated
    form = ChatForm.of(tokenizer) if share else None
    writer = Writer(model, tokenizer, form, length=length, temperature=temperature, top_k=top_k)
    settings = {
        "source": source,
        "tokens": tokens,
        "length": length,
        "chats": share,
        # Templates may depend on the day.
        "form": form and form.asked("?"),
        "batch_size": batch_size,
        "temperature": temperature,
        "top_k": top_k,
        "seed": seed,
        "dtype": str(model.dtype) if dtype else "auto",
        "device": device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    counts = finished_counts(target, settings, overwrite=overwrite) if resume else None
    if counts is not None:
        work.remove_remainder(settings)
        return _result(counts, start, was_there=True)
    with closing(work):
        work.begin(settings, resume=resume, describe=difference)
        if not dtype:
            write_json(work.path / _DTYPE, dtype_here)
        batches = list(_batches(work.path, writer, tokens, share, batch_size, seed, progress))
        lines = (
            json.dumps({"text": text}, ensure_ascii=False) for batch in batches for text in batch["texts"]
        )
        content = "".join(f"{line}\n" for line in lines).encode()
        counts = {
            "texts": sum(len(batch["texts"]) for batch in batches),
            "chats": sum(len(batch["texts"]) for batch in batches if batch["chats"]),
            "tokens": sum(batch["tokens"] for batch in batches),
        }
        write_record(target, content, settings, counts, dtype=str(model.dtype))
        write_file(target, content)
        work.remove()
    return _result(counts, start)


def _result(counts: dict[str, int], start: float, *, was_there: bool = False) -> WrittenText:
    seconds = time.perf_counter() - start
    return WrittenText(counts["texts"], counts["chats"], counts["tokens"], seconds, was_there)


def _batches(
    folder: Path, writer: Writer, tokens: int, share: float, batch_size: int, seed: int, progress: bool
) -> Iterator[dict[str, Any]]:
    """Yield batches until there are enough tokens: those of the folder first, then new ones, kept there."""
    written = {True: 0, False: 0}
    index = empty = 0
    with tqdm(total=tokens, desc="write", unit=" tokens", disable=None if progress else True) as bar:
        while sum(written.values()) < tokens:
            chats = written[True] < share * sum(written.values()) or share == 1
            path = folder / f"{index:06}.json"
            if path.is_file():
                batch = json.loads(path.read_text("utf-8"))
            else:
                # As many texts as their kind lacks.
                lacking = (share if chats else 1 - share) * tokens - written[chats]
                size = min(max(math.ceil(lacking / writer.length), 1), batch_size)
                batch = _drawn(writer, chats, size, seed * 1_000_003 + index)
                write_file(path, json.dumps(batch).encode())
            empty = 0 if batch["tokens"] else empty + 1
            if empty == _EMPTY:
                raise ValueError(
                    f"the model must write something, got {_EMPTY} batches of empty texts: give another "
                    "temperature, top_k or chats"
                )
            written[chats] += batch["tokens"]
            bar.update(batch["tokens"])
            index += 1
            yield batch


def _drawn(writer: Writer, chats: bool, size: int, seed: int) -> dict[str, Any]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        texts = writer.chats(size) if chats else writer.free(size)
    return {
        "chats": chats,
        "tokens": sum(count for _, count in texts),
        "texts": [text for text, _ in texts],
    }
