"""Text into blocks of tokens."""

from __future__ import annotations

import gzip
import json
import pickle
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch

from littlebit2.train.data import TokenBlocks, TokenFile, find_files, read_texts, sources, write_tokens
from tests.train.builders import byte_tokenizer

DOCUMENTS = ["first document", "second: naïve ☃", "third\nof two lines"]


def write_all(folder: Path) -> dict[str, Path]:
    """The same documents in every format."""
    files = {
        name: folder / name for name in ("a.txt", "b.jsonl", "c.parquet", "d.arrow", "e.jsonl.gz", "f.arrow")
    }
    files["a.txt"].write_text("".join(DOCUMENTS), "utf-8")
    lines = "\n".join(json.dumps({"text": text, "id": 1}) for text in DOCUMENTS) + "\n\n"
    files["b.jsonl"].write_text(lines, "utf-8")
    files["e.jsonl.gz"].write_bytes(gzip.compress(lines.encode()))
    table = pyarrow.table({"text": DOCUMENTS, "id": [1, 2, 3]})
    pyarrow.parquet.write_table(table, files["c.parquet"])
    with pyarrow.ipc.new_stream(files["d.arrow"], table.schema) as writer:
        writer.write_table(table)
    with pyarrow.ipc.new_file(files["f.arrow"], table.schema) as writer:
        writer.write_table(table)
    return files


def test_every_format_gives_the_documents(tmp_path: Path) -> None:
    files = write_all(tmp_path)
    for name, file in files.items():
        pieces = list(read_texts([file]))
        if name == "a.txt":
            assert pieces == [("".join(DOCUMENTS), True)]
        else:
            assert pieces == [(text, True) for text in DOCUMENTS], name


def test_directories_are_searched_in_order(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("b.txt", "a.py", "image.png", "sub/c.md"):
        (tmp_path / name).write_text(name)
    assert [file.name for file in find_files(tmp_path)] == ["a.py", "b.txt", "c.md"]
    assert find_files([tmp_path / "b.txt"]) == [tmp_path / "b.txt"]


def test_large_files_come_in_parts_cut_at_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "_PIECE", 16)
    content = "".join(f"line {i} is here\n" for i in range(20)) + "no end"
    file = tmp_path / "long.txt"
    file.write_text(content)
    pieces = list(read_texts([file]))
    assert len(pieces) > 5
    assert "".join(text for text, _ in pieces) == content
    assert [ends for _, ends in pieces] == [False] * (len(pieces) - 1) + [True]
    assert all(text.endswith("\n") for text, _ in pieces[:-1])


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="data must name at least one file or directory, got none"):
        find_files([])
    with pytest.raises(FileNotFoundError, match=r"no such file or directory: .*absent\.txt"):
        find_files(tmp_path / "absent.txt")
    (tmp_path / "x.docx").write_text("x")
    with pytest.raises(ValueError, match=r"x\.docx must be of a known type \(\.txt, .*\), got '\.docx'"):
        find_files(tmp_path / "x.docx")
    with pytest.raises(ValueError, match=r"must hold files of a known type .* got none"):
        find_files(tmp_path)
    (tmp_path / "t.parquet.gz").write_text("x")
    with pytest.raises(ValueError, match="must be of a known type"):
        find_files(tmp_path / "t.parquet.gz")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', r"a\.jsonl, line 2: must be JSON"),
        (
            "a.jsonl",
            b'{"body": "x"}\n',
            r"line 1: must be an object with a string 'text', got keys \['body'\]",
        ),
        ("a.jsonl", b'["x"]\n', "must be an object with a string 'text', got list"),
        ("a.txt", b"caf\xe9", r"a\.txt must be UTF-8 text"),
        ("a.txt.gz", b"no gzip", r"a\.txt\.gz cannot be read"),
        ("a.parquet", b"PAR1 no PAR1", r"a\.parquet cannot be read"),
        ("a.arrow", b"ARROW1 not", r"a\.arrow cannot be read"),
    ],
)
def test_malformed_files(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        list(read_texts(find_files(tmp_path / name)))


def test_tables_without_the_column(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"must have a column 'text', got \['body'\]"):
        list(read_texts([tmp_path / "a.parquet"]))
    assert list(read_texts([tmp_path / "a.parquet"], "body")) == [("x", True)]
    pyarrow.parquet.write_table(pyarrow.table({"text": [1]}), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match="column 'text' must hold strings, got int64"):
        list(read_texts([tmp_path / "b.parquet"]))
    pyarrow.parquet.write_table(pyarrow.table({"text": ["x", None]}), tmp_path / "c.parquet")
    with pytest.raises(ValueError, match="must hold strings, got a null"):
        list(read_texts([tmp_path / "c.parquet"]))


def test_documents_end_with_the_end_of_text(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    texts = [("ab", False), ("c", True), ("d", True)]
    found = write_tokens(tmp_path / "t", iter(texts), tokenizer)
    a, b, c, d = (tokenizer(x)["input_ids"][0] for x in "abcd")
    assert found.array().tolist() == [a, b, c, 0, d, 0]
    assert (found.tokens, found.documents, found.characters, found.dtype) == (6, 2, 4, "uint16")
    assert TokenFile.open(tmp_path / "t") == found
    cut = write_tokens(tmp_path / "u", iter(texts), tokenizer, max_tokens=3)
    assert cut.array().tolist() == [a, b, c]


def test_nothing_is_left_of_a_file_that_fails(tmp_path: Path) -> None:
    def failing() -> Iterator[tuple[str, bool]]:
        yield "text", True
        raise ValueError("broken source")

    with pytest.raises(ValueError, match="broken source"):
        write_tokens(tmp_path / "t", failing(), byte_tokenizer())
    assert TokenFile.open(tmp_path / "t") is None
    with pytest.raises(ValueError, match="data must hold text, got none"):
        write_tokens(tmp_path / "t", iter([("", True)]), byte_tokenizer())
    write_tokens(tmp_path / "t", iter([("text", True)]), byte_tokenizer())
    with open(tmp_path / "t", "ab") as file:
        file.write(b"x")
    with pytest.raises(ValueError, match="must have 10 bytes, got 11: remove it"):
        TokenFile.open(tmp_path / "t")


def test_blocks(tmp_path: Path) -> None:
    tokens = write_tokens(tmp_path / "t", iter([("abcdefghij", True)]), byte_tokenizer())
    blocks = TokenBlocks(tokens, 4)
    assert (len(blocks), blocks.total) == (2, 2)  # 11 tokens
    ids = tokens.array().astype(int).tolist()
    assert blocks[1]["input_ids"].tolist() == ids[4:8]
    assert blocks[1]["input_ids"].dtype == torch.int64
    last = pickle.loads(pickle.dumps(TokenBlocks(tokens, 4, 1)))
    assert len(last) == 1
    assert last[0]["block"].item() == 1
    with pytest.raises(IndexError, match="index must be from 0 to 0, got 1"):
        last[1]
    with pytest.raises(ValueError, match="at least one block of 12 tokens, got 11 tokens"):
        TokenBlocks(tokens, 12)
    with pytest.raises(ValueError, match="block must be at least 2 tokens, got 1"):
        TokenBlocks(tokens, 1)
    with pytest.raises(ValueError, match="start must be from 0 to below 2, got 2"):
        TokenBlocks(tokens, 4, 2)
