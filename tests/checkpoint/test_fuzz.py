"""Damaged bytes: whatever is flipped or cut, the reader gives tensors or a CheckpointError."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from littlebit2.checkpoint import CheckpointError, CheckpointWriter, convert
from littlebit2_kernels.testing import make_packed
from tests.checkpoint import wild
from tests.checkpoint.test_malformed import load_all

ROUNDS = 400
#: Bytes that keep damaged JSON parseable more often than random ones do.
TELLING = np.frombuffer(b'0123456789-+.eE"{}[],: \\\x00\xfftruefalsenullNaN', np.uint8)


def damage(raw: bytes, rng: np.random.Generator, limit: int) -> bytes:
    """Change a few bytes among the first ``limit``; or cut, repeat or remove a stretch."""
    data = np.frombuffer(raw, np.uint8).copy()
    limit = min(limit, len(data))
    kind = rng.integers(5)
    begin, end = sorted(rng.integers(0, limit + 1, 2))
    if kind == 0:
        return raw[: rng.integers(0, len(raw))]
    if kind == 1:
        return raw[:begin] + raw[end:]
    if kind == 2:
        return raw[:end] + raw[begin:]
    where = rng.integers(0, limit, rng.integers(1, 5))
    data[where] = rng.choice(TELLING, len(where)) if kind == 3 else rng.integers(0, 256, len(where))
    return data.tobytes()


ODD = (None, True, -1, 0, 7, 2.5, 10**30, float("inf"), "", "x", "..", [], [0, 0], {}, {"a": 1})


def replace_one(value: Any, rng: np.random.Generator) -> Any:
    """Replace, drop or repeat one value somewhere in a JSON tree."""
    if not isinstance(value, (dict, list)) or not value or rng.integers(6) == 0:
        return ODD[rng.integers(len(ODD))]
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key = keys[rng.integers(len(keys))]
    changed = copy.copy(value)
    if rng.integers(8) == 0:
        del changed[key]
    elif rng.integers(8) == 0 and isinstance(changed, dict):
        changed[rng.choice(["x", "m.a.u1", f"{key}_R"])] = changed[key]
    else:
        changed[key] = replace_one(value[key], rng)
    return changed


def damage_json(name: str, raw: bytes, rng: np.random.Generator) -> bytes:
    """The same inside the JSON of a file: what parses and yet is wrong."""
    if name.endswith(".json"):
        return json.dumps(replace_one(json.loads(raw), rng)).encode()
    end = 8 + int.from_bytes(raw[:8], "little")
    header = json.dumps(replace_one(json.loads(raw[8:end]), rng)).encode()
    return len(header).to_bytes(8, "little") + header + raw[end:]


def make(directory: Path, rng: np.random.Generator, kind: str) -> None:
    if kind == "ours":
        generator = torch.Generator().manual_seed(0)
        with CheckpointWriter(directory, wild.CONFIG, max_shard_bytes=3000) as writer:
            writer.add_layer("m.a", make_packed(40, 24, (16, 16), share_v=True, generator=generator))
            writer.add_layer("m.b", make_packed(40, 24, None, generator=generator))
            writer.add_tensor("m.e.weight", torch.ones(20, 40))
            writer.finish()
    elif kind == "pickled":
        directory.mkdir()
        layer = wild.random_layer(rng, 40, 24, [16])
        torch.save(wild.prefixed({"m.a": layer.upstream()}), directory / "pytorch_model.bin")
    elif kind == "latent":
        layer = wild.random_layer(rng, 40, 24, [16])
        wild.write(directory, wild.prefixed({"m.a": layer.latent(rng)}), config=wild.CONFIG)
    elif kind == "nanoquant":
        layer = wild.random_layer(rng, 40, 24, [20])
        wild.write(directory, wild.prefixed({"m.a": layer.nanoquant()}), config=wild.CONFIG)
    else:
        wild.upstream_model(directory, rng, shards=2)


@pytest.mark.parametrize("kind", ["ours", "authors", "latent", "nanoquant", "pickled"])
def test_damaged_checkpoints(tmp_path: Path, nprng: np.random.Generator, kind: str) -> None:
    good = tmp_path / "good"
    make(good, nprng, kind)
    load_all(good)
    names = sorted(item.name for item in good.iterdir())
    refused: list[str] = []
    for number in range(ROUNDS if kind != "pickled" else ROUNDS // 4):
        name = names[nprng.integers(len(names))]
        bad = tmp_path / "bad"
        shutil.copytree(good, bad)
        raw = (good / name).read_bytes()
        headed = name.endswith(".safetensors")
        limit = 8 + int.from_bytes(raw[:8], "little") if headed and number % 4 else len(raw)
        structured = kind != "pickled" and number % 2 == 0
        changed = damage_json(name, raw, nprng) if structured else damage(raw, nprng, limit)
        (bad / name).write_bytes(changed)
        try:
            load_all(bad)
        except CheckpointError as error:
            refused.append(str(error))
        shutil.rmtree(bad)
    assert len(refused) > ROUNDS // 8, "the damage must be worth looking at"
    assert all(message.isprintable() and str(tmp_path / "bad") in message for message in refused)


def test_damaged_input_leaves_no_output(tmp_path: Path, nprng: np.random.Generator) -> None:
    good, bad, out = tmp_path / "good", tmp_path / "bad", tmp_path / "out"
    make(good, nprng, "authors")
    for number in range(60):
        shutil.copytree(good, bad)
        name = sorted(item.name for item in good.iterdir())[number % 5]
        (bad / name).write_bytes(damage((good / name).read_bytes(), nprng, 10**9))
        try:
            convert(bad, out, "littlebit2")
        except CheckpointError:
            assert sorted(item.name for item in tmp_path.iterdir()) == ["bad", "good"]
        else:
            load_all(out)
            shutil.rmtree(out)
        shutil.rmtree(bad)
