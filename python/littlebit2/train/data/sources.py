"""Documents out of files: plain text, JSON lines, Parquet and Arrow, each read as a stream."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, TextIO

__all__ = ["SUFFIXES", "find_files", "read_texts"]

#: A document, or a part of one; whether it ends there.
Piece = tuple[str, bool]

#: Characters of a document that are held at a time; a file of any size is read in parts cut at line ends.
_PIECE = 1 << 20
#: Rows of a table that are held at a time.
_ROWS = 1024


def find_files(paths: str | Path | Sequence[str | Path]) -> list[Path]:
    """Return the data files that ``paths`` name, directories searched through, in a fixed order.

    Args:
        paths: files of a known type (:data:`SUFFIXES`, also with ``.gz`` for text), or directories, whose
            files of other types are passed over.

    Raises:
        FileNotFoundError: a path does not exist.
        ValueError: nothing is given, a file is of an unknown type, or a directory holds none of a known one.
    """
    given = [paths] if isinstance(paths, (str, Path)) else list(paths)
    if not given:
        raise ValueError("data must name at least one file or directory, got none")
    found: list[Path] = []
    for path in map(Path, given):
        if path.is_dir():
            inside = [file for file in sorted(path.rglob("*")) if file.is_file() and _kind(file) in SUFFIXES]
            if not inside:
                raise ValueError(f"data: {path} must hold files of a known type ({_known()}), got none")
            found += inside
        elif not path.exists():
            raise FileNotFoundError(f"data: no such file or directory: {path}")
        elif _kind(path) not in SUFFIXES:
            raise ValueError(
                f"data: {path} must be of a known type ({_known()}), got {path.suffix or 'none'!r}"
            )
        else:
            found.append(path)
    return found


def read_texts(files: Sequence[Path], field: str = "text") -> Iterator[Piece]:
    """Yield the documents of ``files`` in pieces, with whether a document ends with the piece.

    A text file is one document; every line of JSON lines and every row of a table is one.

    Args:
        files: from :func:`find_files`.
        field: name of the text in JSON lines and tables.

    Raises:
        ImportError: a table needs pyarrow, which is not installed.
        ValueError: a file is malformed, not UTF-8, or lacks the field; the message names file and place.
    """
    for file in files:
        try:
            yield from SUFFIXES[_kind(file)](file, field)
        except UnicodeDecodeError as error:
            raise ValueError(f"data: {file} must be UTF-8 text, got something else: {error}") from error
        except (OSError, EOFError) as error:
            raise ValueError(f"data: {file} cannot be read: {error}") from error


def _kind(file: Path) -> str:
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if suffixes[-1:] == [".gz"]:
        # Tables compress by themselves; their libraries take no compressed files.
        inner = suffixes[-2] if len(suffixes) > 1 else ""
        return inner if SUFFIXES.get(inner) in (_plain, _json_lines) else ".gz"
    return suffixes[-1] if suffixes else ""


def _known() -> str:
    return ", ".join(SUFFIXES)


@contextmanager
def _opened(file: Path) -> Iterator[TextIO]:
    opener: Callable[..., Any] = gzip.open if file.suffix.lower() == ".gz" else open
    with opener(file, "rt", encoding="utf-8", newline="\n") as stream:
        yield stream


def _plain(file: Path, field: str) -> Iterator[Piece]:
    with _opened(file) as stream:
        piece = stream.read(_PIECE)
        while piece:
            piece += stream.readline(_PIECE)
            following = stream.read(_PIECE)
            yield piece, not following
            piece = following


def _json_lines(file: Path, field: str) -> Iterator[Piece]:
    with _opened(file) as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"data: {file}, line {number}: must be JSON, got {line[:60]!r}") from error
            if not isinstance(row, dict) or not isinstance(row.get(field), str):
                got = f"keys {sorted(row)}" if isinstance(row, dict) else type(row).__name__
                raise ValueError(
                    f"data: {file}, line {number}: must be an object with a string {field!r}, got {got}"
                )
            yield row[field], True


def _parquet(file: Path, field: str) -> Iterator[Piece]:
    parquet = _pyarrow("pyarrow.parquet", file)
    with _malformed(file), parquet.ParquetFile(file) as table:
        _check_column(file, field, table.schema_arrow)
        for batch in table.iter_batches(batch_size=_ROWS, columns=[field]):
            yield from _rows(file, field, batch)


def _arrow(file: Path, field: str) -> Iterator[Piece]:
    """The streams of ``datasets.save_to_disk``, and Arrow's own files."""
    ipc = _pyarrow("pyarrow.ipc", file)
    with _malformed(file), open(file, "rb") as source:
        random_access = source.read(6) == b"ARROW1"
        source.seek(0)
        reader = ipc.open_file(source) if random_access else ipc.open_stream(source)
        _check_column(file, field, reader.schema)
        batches = (reader.get_batch(i) for i in range(reader.num_record_batches)) if random_access else reader
        for batch in batches:
            yield from _rows(file, field, batch)


def _pyarrow(module: str, file: Path) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(
            f"data: {file} needs pyarrow, which is not installed: pip install 'littlebit2-kernels[train]'"
        ) from error


@contextmanager
def _malformed(file: Path) -> Iterator[None]:
    errors = import_module("pyarrow").ArrowException
    try:
        yield
    except errors as error:
        raise ValueError(f"data: {file} cannot be read: {error}") from error


def _check_column(file: Path, field: str, schema: Any) -> None:
    if field not in schema.names:
        raise ValueError(f"data: {file} must have a column {field!r}, got {schema.names}")
    kind = str(schema.field(field).type)
    if kind not in ("string", "large_string", "string_view"):
        raise ValueError(f"data: {file}: column {field!r} must hold strings, got {kind}")


def _rows(file: Path, field: str, batch: Any) -> Iterator[Piece]:
    for text in batch.column(field).to_pylist():
        if text is None:
            raise ValueError(f"data: {file}: column {field!r} must hold strings, got a null")
        yield text, True


#: What reads a file, by the end of its name.
SUFFIXES: dict[str, Callable[[Path, str], Iterator[Piece]]] = {
    ".txt": _plain,
    ".text": _plain,
    ".md": _plain,
    ".rst": _plain,
    ".py": _plain,
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".parquet": _parquet,
    ".arrow": _arrow,
}
