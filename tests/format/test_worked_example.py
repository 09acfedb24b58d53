"""The numbers printed in docs/format.md are right: recomputed in exact arithmetic, and by the package."""

from __future__ import annotations

import json
import re
import struct
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from littlebit2_kernels.format import pack_signs_reference, unpack_signs_reference
from littlebit2_kernels.reference import linear_reference
from littlebit2_kernels.state import packed_from_state, packed_to_state

TEXT = (Path(__file__).parents[2] / "docs/format.md").read_text("utf-8")


def block(name: str) -> dict:
    """Return the fenced JSON block of docs/format.md called ``name``."""
    (found,) = re.findall(rf"^```json {name}\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
    return json.loads(found)


SIGNS, STATE, COMPUTATION = block("signs"), block("state_dict"), block("computation")


def words_of(hexadecimal: list[list[str]]) -> torch.Tensor:
    raw = [[struct.unpack("<i", struct.pack("<I", int(word, 16)))[0] for word in row] for row in hexadecimal]
    return torch.tensor(raw, dtype=torch.int32)


def example_state() -> dict[str, torch.Tensor]:
    """The printed state_dict with the dtypes of section 4."""

    def tensor(name: str) -> torch.Tensor:
        if "packed" in name:
            return words_of(STATE[name])
        integers = name.startswith(("V_shape", "U_shape", "V_shared"))
        return torch.tensor(STATE[name], dtype=torch.int64 if integers else torch.float32)

    return {name: tensor(name) for name in STATE}


def test_signs_example() -> None:
    values = torch.ones(SIGNS["rows"], SIGNS["cols"])
    for row, columns in enumerate(SIGNS["negative_columns"]):
        values[row, columns] = -1.0
    values[1, 0], values[1, 1] = -0.0, 0.0
    words = pack_signs_reference(values)
    assert words.tolist() == SIGNS["int32"]
    assert torch.equal(words, words_of(SIGNS["words"]))
    assert struct.pack("<4i", *words.flatten().tolist()) == bytes.fromhex(SIGNS["bytes"])


def table_rows(header: str) -> list[list[str]]:
    """Return the cells of the table under the line that starts with ``header``, without code marks."""
    lines = TEXT[TEXT.index(header) :].splitlines()[2:]
    rows = []
    for line in lines:
        if not line.startswith("|"):
            break
        rows.append([cell.strip().replace("`", "") for cell in line.strip("|").split("|")])
    return rows


def packed_by_table(signs: str, word: str) -> tuple[list[int], int]:
    return [-1 if sign == "-" else 1 for sign in signs.split()], int(word.rsplit("0x", 1)[1], 16)


@pytest.mark.parametrize(
    ("header", "columns", "key"),
    [
        ("| row of V |", (1, 3), "V_packed"),
        ("| row | U of path 0 |", (1, 2), "U_packed"),
        ("| row | U of path 0 |", (3, 4), "U_packed_R"),
    ],
    ids=["V", "U", "U_R"],
)
def test_tables_of_signs_and_words(header: str, columns: tuple[int, int], key: str) -> None:
    rows = [packed_by_table(*(row[column] for column in columns)) for row in table_rows(header)]
    assert [[word] for _, word in rows] == [[int(word, 16)] for (word,) in STATE[key]]
    signs = torch.tensor([signs for signs, _ in rows])
    assert torch.equal(pack_signs_reference(signs), words_of(STATE[key]))
    shape = STATE[key.replace("packed", "shape") if key != "V_packed" else "V_shape"]
    assert list(signs.shape) == shape


def sign(word: str, column: int) -> int:
    return 1 - 2 * (int(word, 16) >> column & 1)


def product(words: list[list[str]], values: list[Fraction]) -> list[Fraction]:
    return [sum((sign(word, c) * value for c, value in enumerate(values)), Fraction(0)) for (word,) in words]


def scaled(values: list[Fraction], scales: list[float]) -> list[Fraction]:
    return [value * Fraction(scale) for value, scale in zip(values, scales, strict=True)]


def test_computation_in_exact_arithmetic() -> None:
    """Plain Python on the words as printed, without torch: what a reader of the document would do."""
    x = [Fraction(value) for value in COMPUTATION["x"]]
    scaled_x = scaled(x, STATE["v2"][0])
    assert scaled_x == COMPUTATION["scaled_x"]
    z = product(STATE["V_packed"], scaled_x)
    assert z == COMPUTATION["z"]
    y = [Fraction(value) for value in STATE["bias"]]
    for suffix, expected in zip(("", "_R"), COMPUTATION["paths"], strict=True):
        scaled_z = scaled(z, STATE[f"latent_scale{suffix}"][0])
        assert scaled_z == expected["scaled_z"]
        second = product(STATE[f"U_packed{suffix}"], scaled_z)
        assert second == expected["second_stage"]
        path_y = scaled(second, STATE[f"u1{suffix}"][0])
        assert path_y == expected["y"]
        y = [total + part for total, part in zip(y, path_y, strict=True)]
    assert y == COMPUTATION["y"]


# Not bfloat16: 74.25 needs 9 significant bits and it has 8.
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_reference_computes_the_example_exactly(dtype: torch.dtype) -> None:
    layer = packed_from_state(example_state())
    assert layer.paths[1].shares_first_stage(layer.paths[0])
    y = linear_reference(torch.tensor([COMPUTATION["x"]]), layer, dtype)
    assert torch.equal(y, torch.tensor([COMPUTATION["y"]], dtype=dtype))


def test_package_writes_the_state_dict_as_printed() -> None:
    state = example_state()
    written = packed_to_state(packed_from_state(state))
    assert set(written) == set(state)
    for name, tensor in written.items():
        assert tensor.dtype == state[name].dtype, name
        assert torch.equal(tensor, state[name]), name


def test_authors_pair_is_folded_in_float32() -> None:
    """bfloat16 cannot hold the product of 1.0078125 with itself; float32 can."""
    state = example_state()
    v1 = torch.full((1, 8), 1.0078125, dtype=torch.bfloat16)
    del state["latent_scale"]
    layer = packed_from_state({**state, "v1": v1, "u2": v1})
    assert layer.paths[0].latent_scale.tolist() == [1.0078125**2] * 8


def test_example_shows_pad_bits() -> None:
    """Reading the 24 pad bits of U as signs gives +1, as section 2 warns."""
    assert (unpack_signs_reference(words_of(STATE["U_packed"]), 32)[:, 8:] == 1).all()
