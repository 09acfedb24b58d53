"""What lies beside the weights: copied, or left and said so; checksums; what ``overwrite`` may replace."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from littlebit2.checkpoint import CheckpointError, CheckpointWriter, convert, find_side_files, open_checkpoint
from littlebit2.cli import main
from tests.checkpoint import wild

COPIED = (
    "tokenizer.json",
    "tokenizer.model",
    "generation_config.json",
    "chat_template.jinja",
    "normalizer.json",
    "video_preprocessor_config.json",
    "source.spm",
    "bpe.codes",
    "tekken.json",
    "qwen.tiktoken",
    "vocab.txt",
    "modules.json",
    "README.md",
    "1_Pooling/config.json",
    "2_Dense/config.json",
    "2_Dense/model.safetensors",
    "onnx/ort_config.json",
    "spk_dict.pt",
    "additional_chat_templates/tools.jinja",
)
LEFT = {
    "modeling_own.py": "code",
    "onnx/model.onnx": "weights in another file than the model's",
    "onnx/model.onnx_data": "weights in another file than the model's",
    "model.gguf": "weights in another file than the model's",
    "tf_model.h5": "weights in another file than the model's",
    "flax_model.msgpack": "weights in another file than the model's",
    "pytorch_model.bin": "weights in another file than the model's",
    "fp16/model.safetensors": "weights in another file than the model's",
    ".gitattributes": "hidden",
    ".git/": "hidden",
}


@pytest.fixture
def source(tmp_path: Path, nprng: np.random.Generator) -> Path:
    path = tmp_path / "source"
    wild.upstream_model(path, nprng)
    for name in (*COPIED, *LEFT):
        file = path / name
        if name.endswith("/"):
            file.mkdir()
        else:
            file.parent.mkdir(exist_ok=True)
            file.write_text(name)
    modules = [{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}]
    (path / "modules.json").write_text(json.dumps(modules))
    return path


def everything(path: Path) -> dict[str, bytes]:
    return {
        file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()
    }


@pytest.mark.parametrize("to", ["littlebit2", "littlebit"])
def test_everything_but_weights_and_code_is_copied(source: Path, tmp_path: Path, to: str) -> None:
    found = convert(source, tmp_path / "out", to)
    assert (set(found.copied), dict(found.left)) == (set(COPIED), LEFT)
    written = everything(tmp_path / "out")
    rest = {"config.json", "model.safetensors", *(["littlebit_config.json"] if to == "littlebit" else [])}
    assert set(written) == {*COPIED, *rest}
    for name in COPIED:
        assert written[name] == (source / name).read_bytes(), name


def test_what_was_left_is_said(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(source), str(tmp_path / "out"), "--to", "littlebit2"]) == 0
    said = capsys.readouterr().err
    assert "not copied (code): modeling_own.py" in said
    assert "model.gguf" in said


def test_files_and_folders_that_lead_elsewhere(source: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "file").write_text("secret")
    (source / "linked").symlink_to(tmp_path / "secret")
    assert find_side_files(source).left["linked/"] == "a link"
    (source / "1_Pooling" / "inner").symlink_to(tmp_path / "secret" / "file")
    with pytest.raises(CheckpointError, match=r"1_Pooling/inner: must lie inside"):
        convert(source, tmp_path / "out", "littlebit2")
    assert not (tmp_path / "out").exists()


def test_overwriting_a_checkpoint_with_folders(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(source, out, "littlebit2")
    with pytest.raises(FileExistsError, match="--overwrite"):
        convert(source, out, "littlebit2")
    before = everything(out)
    convert(source, out, "littlebit2", overwrite=True)
    assert everything(out) == before
    (out / "1_Pooling" / "mine.txt").write_text("not ours to delete")
    with pytest.raises(FileExistsError, match=r"which also holds 1_Pooling/mine\.txt: move or"):
        convert(source, out, "littlebit2", overwrite=True)
    assert (out / "1_Pooling" / "mine.txt").exists()


def test_folders_that_appear_meanwhile_are_kept(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert(source, out, "littlebit")
    with CheckpointWriter(out, {}, overwrite=True, replaces=find_side_files(source).copied) as writer:
        writer.add_tensor("a", torch.ones(2))
        with pytest.raises(FileExistsError, match="which also holds 1_Pooling/"):
            writer.finish()  # without the folders, which it would remove


def flip(file: Path, position: int) -> None:
    raw = bytearray(file.read_bytes())
    raw[position] ^= 4
    file.write_bytes(raw)


def rename_tensor(file: Path) -> None:
    raw = file.read_bytes()
    assert raw.count(b"model.norm.weight") == 1
    file.write_bytes(raw.replace(b"model.norm.weight", b"model.norm.weighu"))


@pytest.mark.parametrize("to", ["littlebit2", "littlebit"])
@pytest.mark.parametrize(
    "damage",
    [lambda file: flip(file, -1), lambda file: flip(file, -4000), rename_tensor],
    ids=["last byte", "inside", "name"],
)
def test_checksums_find_what_headers_do_not_show(
    tmp_path: Path,
    nprng: np.random.Generator,
    damage: Callable[[Path], None],
    to: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    wild.upstream_model(tmp_path / "theirs", nprng)
    convert(tmp_path / "theirs", tmp_path / "out", to)
    command = ["inspect", str(tmp_path / "out"), "--verify"]
    assert main(command) == 0
    assert "model.safetensors: its checksum is right" in capsys.readouterr().out
    damage(tmp_path / "out" / "model.safetensors")
    assert main(command[:-1]) == 0, "headers alone do not show it"
    assert main(command) == 1
    assert "model.safetensors: DAMAGED" in capsys.readouterr().out
    assert main([*command, "--json"]) == 1
    assert '"model.safetensors": false' in capsys.readouterr().out


def test_every_shard_has_a_checksum(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "out", {}, max_shard_bytes=100) as writer:
        for name in "abc":
            writer.add_tensor(name, torch.full((30,), 2.0))
        writer.finish()
    with open_checkpoint(tmp_path / "out") as checkpoint:
        assert list(checkpoint.verify().values()) == [True] * 3
        flip(tmp_path / "out" / "model-00002-of-00003.safetensors", -1)
        assert list(checkpoint.verify().values()) == [True, False, True]


def test_files_without_a_checksum(
    tmp_path: Path, nprng: np.random.Generator, capsys: pytest.CaptureFixture[str]
) -> None:
    wild.upstream_model(tmp_path / "old", nprng)
    assert main(["inspect", str(tmp_path / "old"), "--verify"]) == 0
    assert "model.safetensors: has no checksum" in capsys.readouterr().out
    convert(tmp_path / "old", tmp_path / "ours", "littlebit2")
    plain = load_file(tmp_path / "ours" / "model.safetensors")
    save_file(plain, tmp_path / "ours" / "model.safetensors", {"format": "pt"})
    with open_checkpoint(tmp_path / "ours") as checkpoint:
        assert checkpoint.verify() == {"model.safetensors": None}
        for name in checkpoint.layers:
            checkpoint.load_layer(name)
