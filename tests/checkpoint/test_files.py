"""Which files a checkpoint is read from, and how: names, links, and the work that reading takes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from littlebit2.checkpoint import CheckpointError, files, headers, open_checkpoint
from tests.checkpoint import wild

UP = wild.UP


def names_in(path: Path) -> tuple[list[str], list[str]]:
    with open_checkpoint(path) as checkpoint:
        for name in checkpoint.layers:
            checkpoint.load_layer(name)
        return list(checkpoint.layers), list(checkpoint.dense)


@pytest.fixture
def authors(tmp_path: Path, nprng: np.random.Generator) -> Path:
    wild.upstream_model(tmp_path / "model", nprng)
    return tmp_path / "model"


@pytest.fixture
def cache(tmp_path: Path, nprng: np.random.Generator) -> Path:
    """A snapshot folder of a download cache, with a folder in it; returns the root of the cache."""
    snapshot, blobs = tmp_path / "hub/models--a--b/snapshots/rev", tmp_path / "hub/models--a--b/blobs"
    for folder, up in ((snapshot, "../../"), (snapshot / "variant", "../../../")):
        wild.upstream_model(folder, nprng)
        blobs.mkdir(exist_ok=True)
        for file in [item for item in folder.iterdir() if item.is_file()]:
            blob = f"{folder.name}-{file.name}"
            file.rename(blobs / blob)
            file.symlink_to(f"{up}blobs/{blob}")
    return tmp_path


@pytest.mark.parametrize(
    "how", ["itself", "a link", "a link to a link", "two dots", "a folder in it", "relative"]
)
def test_every_path_to_a_snapshot(cache: Path, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = cache / "hub/models--a--b/snapshots/rev"
    (cache / "link").symlink_to(snapshot)
    (cache / "second").symlink_to("link")
    (snapshot.parent / "other").mkdir()
    monkeypatch.chdir(cache)
    path = {
        "itself": snapshot,
        "a link": cache / "link",
        "a link to a link": cache / "second",
        "two dots": snapshot.parent / "other" / ".." / "rev",
        "a folder in it": cache / "link" / "variant",
        "relative": Path("link/../rev"),  # from the parent of what the link leads to
    }[how]
    assert UP in names_in(path)[0]


def test_links_may_not_leave_the_snapshot_by_another_way(cache: Path) -> None:
    snapshot = cache / "hub/models--a--b/snapshots/rev"
    (cache / "hub/secret").write_text("{}")
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to("../../../secret")
    (cache / "link").symlink_to(snapshot)
    with pytest.raises(CheckpointError, match=r"config\.json: must lie inside"):
        open_checkpoint(cache / "link")


@pytest.mark.parametrize(
    "name",
    ["quantized.safetensors", "model.fp16.safetensors", "model_state.pt", "llama-1bit.pt", "weights.pth"],
)
def test_a_single_file_of_another_name(authors: Path, name: str) -> None:
    expected = names_in(authors)
    tensors = load_file(authors / "model.safetensors")
    (authors / "model.safetensors").unlink()
    if name.endswith(".safetensors"):
        save_file(tensors, authors / name)
    else:
        torch.save(tensors, authors / name)
    torch.save({"step": torch.tensor(3)}, authors / "optimizer.pt")  # a training run's state
    assert names_in(authors) == expected


@pytest.mark.parametrize("index", ["other.safetensors.index.json", "model.safetensors.index.fp16.json"])
def test_an_index_of_another_name(tmp_path: Path, nprng: np.random.Generator, index: str) -> None:
    wild.upstream_model(tmp_path, nprng, shards=3)
    expected = names_in(tmp_path)
    (tmp_path / "model.safetensors.index.json").rename(tmp_path / index)
    assert names_in(tmp_path) == expected


def test_several_files_of_which_none_is_the_model(authors: Path) -> None:
    tensors = load_file(authors / "model.safetensors")
    (authors / "model.safetensors").unlink()
    torch.save(tensors, authors / "a.pt")
    torch.save(tensors, authors / "b.pt")
    with pytest.raises(
        CheckpointError, match=r"expected one file to be the file of weights, got a\.pt, b\.pt"
    ):
        open_checkpoint(authors)


def test_shapes_that_a_pickle_holds_as_tuples(tmp_path: Path, nprng: np.random.Generator) -> None:
    layer = wild.random_layer(nprng, 40, 24, [16])
    state: dict[str, Any] = dict(wild.prefixed({"a": layer.nanoquant()}))
    state["a.U_shape"], state["a.V_shape"] = (24, 16), [16, 40]
    torch.save(state, tmp_path / "model.pt")
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.load_layer("a").ranks == (16,)
    state["a.V_shape"] = (8, 40)
    torch.save(state, tmp_path / "model.pt")
    with open_checkpoint(tmp_path) as checkpoint, pytest.raises(CheckpointError, match="V_"):
        checkpoint.load_layer("a")


def test_names_that_a_compiled_module_gave(authors: Path) -> None:
    expected = names_in(authors)
    tensors = load_file(authors / "model.safetensors")
    renamed = {name.replace("model.", "model._orig_mod.", 1): tensor for name, tensor in tensors.items()}
    save_file(renamed, authors / "model.safetensors")
    assert names_in(authors) == expected
    save_file(renamed | {UP + ".u1": torch.ones(1)}, authors / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"{UP}.u1 is there too"):
        open_checkpoint(authors)


def test_headers_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work that grew with the file for every layer would make a checkpoint of many layers quadratic."""
    wild.write(
        tmp_path, {f"m.{i}.weight": torch.full((2,), float(i)) for i in range(50)}, config={}, shards=2
    )
    parsed: list[str] = []
    original = headers.parse_object

    def counting(raw: bytes, where: str) -> dict[str, Any]:
        parsed.append(where)
        return original(raw, where)

    monkeypatch.setattr(headers, "parse_object", counting)
    with open_checkpoint(tmp_path) as checkpoint:
        assert len(parsed) == 2
        for i in range(50):
            assert checkpoint.load_tensor(f"m.{i}.weight").tolist() == [i, i]
            assert checkpoint.read_tensor(f"m.{i}.weight").tolist() == [i, i]
    assert len(parsed) == 2
    assert not hasattr(files, "safetensors"), "its safe_open reads the whole header again"


@pytest.mark.parametrize("pad", range(4))
def test_tensors_at_any_address(tmp_path: Path, pad: int) -> None:
    """A header that is not padded leaves the data unaligned."""
    values = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    header = {"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}
    text = json.dumps(header).encode() + b" " * pad
    raw = len(text).to_bytes(8, "little") + text + values.numpy().tobytes()
    (tmp_path / "model.safetensors").write_bytes(raw)
    with open_checkpoint(tmp_path) as checkpoint:
        tensor = checkpoint.load_tensor("a")
        assert torch.equal(tensor, values)
        assert tensor.data_ptr() % 4 == 0
        assert torch.equal(checkpoint.read_tensor("a"), values)


def test_a_file_that_was_replaced_by_one_of_the_same_size(tmp_path: Path) -> None:
    wild.write(tmp_path, {"a": torch.ones(4)})
    with open_checkpoint(tmp_path) as checkpoint:
        wild.write(tmp_path / "b", {"a": torch.zeros(4)})
        os.replace(tmp_path / "b" / "model.safetensors", tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError, match="the file was changed while it was open"):
            checkpoint.read_tensor("a")
