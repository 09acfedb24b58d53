"""``littlebit2 evaluate``: perplexity of any checkpoint, and tasks of lm-evaluation-harness."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from littlebit2._messages import SettingError, hub_hint
from littlebit2.integrations.loading import load
from littlebit2.train.data import TokenBlocks, find_files, read_texts, write_tokens
from littlebit2.train.perplexity import Agreement, Perplexity, agreement, perplexity
from littlebit2.train.teacher import check_logits

from .settings import DEFAULT_BLOCK

__all__ = ["Evaluation", "context_length", "evaluate_model", "load_tokenizer"]


@dataclass(frozen=True)
class Evaluation:
    """What was measured.

    Attributes:
        perplexity: perplexity on the text, or ``None`` where none was given.
        block: T.
        stride: tokens from the begin of a block to that of the next.
        agreement: comparison with a teacher, or ``None`` where none was given.
        characters: number of characters that the tokens come from.
        tasks: results of lm-evaluation-harness by task: metric to value.
    """

    perplexity: Perplexity | None
    block: int
    stride: int
    agreement: Agreement | None = None
    characters: int = 0
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def ratio(self) -> float | None:
        """The perplexity divided by the teacher's; ``None`` without a teacher."""
        if self.perplexity is None or self.agreement is None:
            return None
        # Of the likelihoods, because each perplexity may be too large for a float.
        return Perplexity(self.perplexity.nll - self.agreement.teacher.nll, self.agreement.tokens).value


def evaluate_model(
    model_dir: str | Path,
    data: str | Path | Sequence[str | Path] | None = None,
    *,
    teacher: str | Path | None = None,
    block: int | None = None,
    stride: int | None = None,
    text_field: str = "text",
    max_tokens: int | None = None,
    batch_size: int = 8,
    tasks: Sequence[str] = (),
    include_path: str | Path | None = None,
    limit: int | None = None,
    **load_options: Any,
) -> Evaluation:
    """Measure a checkpoint, packed or dense.

    Args:
        model_dir: its directory, with a tokenizer.
        data: files or directories of text, see :func:`.find_files`.
        teacher: directory of a dense checkpoint to compare with on the text (KL, top-1); both are in memory.
        block: T; by default 2048 or what the model can take, whichever is less.
        stride: tokens from the begin of a block to that of the next; by default T, so that blocks do not
            overlap. A smaller one gives every token at least ``T - stride`` tokens of context.
        text_field: name of the text in JSON lines and tables.
        max_tokens: read at most so many tokens.
        batch_size: sequences at a time.
        tasks: names of tasks of lm-evaluation-harness, which must be installed and may download data.
        include_path: a folder of further tasks, as the harness describes them (YAML).
        limit: examples of each task.
        **load_options: of :func:`littlebit2.load`: device, dtype, activation, backend.

    Raises:
        FileNotFoundError: a directory or file is not there.
        ImportError: ``tasks`` are given and lm_eval is not installed.
        ValueError: there is nothing to measure, the data is malformed or shorter than a block, or the model
            has no tokenizer or gives no logits.
    """
    if data is None and not tasks:
        raise ValueError("data or tasks must be given: there is nothing to measure")
    if data is None and (teacher is not None or stride is not None):
        name = "stride" if teacher is None else "teacher"
        raise SettingError(f"{name} needs data: tasks do not use it")
    # Before the model, which takes longer to fail.
    for name, value, least in (
        ("block", block, 2),
        ("stride", stride, 1),
        ("max_tokens", max_tokens, 1),
        ("batch_size", batch_size, 1),
        ("limit", limit, 1),
    ):
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if include_path is not None and not tasks:
        raise SettingError("include_path needs tasks: the folder only says where they are described")
    if limit is not None and not tasks:
        raise SettingError("limit needs tasks: it counts their examples; max_tokens limits the text")
    if include_path is not None and not Path(include_path).is_dir():
        raise FileNotFoundError(f"include_path must be a directory, got {include_path}")
    harness = _harness() if tasks else None
    files = find_files(data) if data is not None else []
    tokenizer = load_tokenizer(Path(model_dir))
    if teacher is not None:
        _check_same_tokens(tokenizer, load_tokenizer(Path(teacher), "teacher"), teacher)
    model = load(model_dir, **load_options)
    check_logits(model, "model")
    length = _block(model, block)
    other = None
    if teacher is not None:
        other = load(teacher, **load_options)
        check_logits(other, "teacher")
    found, compared, characters = None, None, 0
    if files:
        with tempfile.TemporaryDirectory() as folder:
            texts = read_texts(files, text_field)
            tokens = write_tokens(Path(folder) / "tokens", texts, tokenizer, max_tokens=max_tokens)
            blocks = TokenBlocks(tokens, length, stride=stride)
            if other is None:
                found = perplexity(model, blocks, batch_size=batch_size)
            else:
                found, compared = agreement(model, other, blocks, batch_size=batch_size)
            characters = tokens.characters
    results = (
        {}
        if harness is None
        else _run_tasks(harness, model, tokenizer, tasks, include_path, limit, batch_size)
    )
    return Evaluation(found, length, stride or length, compared, characters, results)


def load_tokenizer(directory: Path, what: str = "model") -> Any:
    """Return the tokenizer of a model's directory, which messages call ``what``.

    Raises:
        FileNotFoundError: there is no such directory.
        ValueError: it has none.
    """
    if not directory.is_dir():
        raise FileNotFoundError(
            f"{what} must be a checkpoint directory, got {directory}, which is none{hub_hint(directory)}"
        )
    try:
        return AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise ValueError(
            f"{what} must have a tokenizer in its directory, got {directory}: {reason}"
        ) from error


def _check_same_tokens(own: Any, others: Any, teacher: str | Path) -> None:
    if own.get_vocab() != others.get_vocab():
        raise ValueError(f"teacher must have the tokenizer of the model, got another one in {teacher}")


def context_length(model: Any) -> int | None:
    """Return the longest sequence that a model's configuration names, or ``None``."""
    length = getattr(model.config, "max_position_embeddings", None)
    return length if isinstance(length, int) else None


def _block(model: Any, block: int | None) -> int:
    most = context_length(model)
    if block is None:
        return DEFAULT_BLOCK if most is None else min(DEFAULT_BLOCK, most)
    if most is not None and block > most:
        raise ValueError(f"block must be at most {most}, the model's max_position_embeddings, got {block}")
    return block


def _run_tasks(
    harness: Any,
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    include_path: str | Path | None,
    limit: int | None,
    batch_size: int,
) -> dict[str, dict[str, Any]]:
    manager = harness.tasks.TaskManager(include_path=None if include_path is None else str(include_path))
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        raise ValueError(f"tasks must be known to lm-evaluation-harness, got {', '.join(unknown)}")
    wrapped = harness.models.huggingface.HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    out = harness.simple_evaluate(model=wrapped, tasks=list(tasks), task_manager=manager, limit=limit)
    return {task: dict(values) for task, values in out["results"].items()}


def _harness() -> Any:
    try:
        import lm_eval  # noqa: PLC0415  # optional
        import lm_eval.models.huggingface  # noqa: PLC0415
        import lm_eval.tasks  # noqa: PLC0415
    except ImportError as error:
        raise ImportError("tasks need lm-evaluation-harness: pip install lm_eval") from error
    return lm_eval
