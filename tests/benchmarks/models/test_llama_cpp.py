"""Random GGUF files, and what is read from a llama-bench, for which a script stands in."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest

from benchmarks.__main__ import main
from benchmarks.models.llama_cpp import SCALE, TYPES, LlamaBenchError, time_llama_bench, write_gguf
from benchmarks.shapes import LlamaShape

SHAPE = LlamaShape("small", 256, 384, 3, 4, 96, kv_heads=2)


@pytest.mark.parametrize("kind", TYPES)
def test_file(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, SHAPE, 2, kind)
    reader = gguf.GGUFReader(path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert len(tensors) == 3 + 2 * 9
    shapes = {name: tuple(int(size) for size in tensor.shape[::-1]) for name, tensor in tensors.items()}
    assert shapes["blk.1.ffn_down.weight"] == (256, 384)
    assert shapes["blk.0.attn_k.weight"] == (128, 256)
    assert shapes["output.weight"] == shapes["token_embd.weight"] == (96, 256)
    assert tensors["blk.0.attn_q.weight"].tensor_type.name == kind
    assert tensors["output.weight"].tensor_type.name == "Q8_0"
    fields = {name: reader.fields[name].contents() for name in reader.fields if name.startswith("llama.")}
    assert fields["llama.block_count"] == 2
    assert fields["llama.attention.head_count_kv"] == 2


def test_weights_are_of_the_size_of_a_model(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, SHAPE, 1, "Q4_0")
    (gate,) = (t for t in gguf.GGUFReader(path).tensors if t.name == "blk.0.ffn_gate.weight")
    values = gguf.quants.dequantize(gate.data, gate.tensor_type)
    assert values.shape == (384, 256)
    assert 0 < values.std() < SCALE
    assert np.abs(values).max() <= SCALE * 1.001


def test_sizes_that_do_not_fit(tmp_path: Path) -> None:
    shape = LlamaShape("odd", 192, 384, 1, 4, 96)
    with pytest.raises(ValueError, match="columns must be a multiple of 128 for Q1_0, got 192"):
        write_gguf(tmp_path / "model.gguf", shape, 1, "Q1_0")
    with pytest.raises(ValueError, match="gguf does not know the type Q0_0"):
        write_gguf(tmp_path / "model.gguf", shape, 1, "Q0_0")


def _binary(path: Path, body: str) -> Path:
    path.write_text(f"#!{sys.executable}\nimport json, sys\narguments = sys.argv[1:]\n{body}\n")
    path.chmod(0o755)
    return path


#: Steps of 2 and 3 ms, prompts of 7 ms; notes its arguments.
_GOOD = """
value = dict(zip(arguments[::2], arguments[1::2]))
with open(sys.argv[0] + ".calls", "a") as file:
    file.write(json.dumps(value) + "\\n")
tokens = int(value["-n"])
samples = [2e6 * tokens, 3e6 * tokens] if tokens else [7e6, 7e6]
print(json.dumps([{"samples_ns": samples}]))
"""


def test_times(tmp_path: Path) -> None:
    binary = _binary(tmp_path / "bench", _GOOD)
    steps, prefill = time_llama_bench(binary, tmp_path / "m.gguf", 12, 5, threads=3, rounds=2)
    assert steps == pytest.approx([2e-3, 3e-3])
    assert prefill == pytest.approx(7e-3)
    decode, prompt = map(json.loads, Path(f"{binary}.calls").read_text().splitlines())
    assert (decode["-d"], decode["-n"], decode["-p"], decode["-t"], decode["-r"]) == (
        "12",
        "5",
        "0",
        "3",
        "2",
    )
    assert (prompt["-p"], prompt["-n"]) == ("12", "0")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("sys.exit('no such model')", "bench failed with status 1: no such model"),
        ("print('tokens')", "bench printed no JSON: 'tokens"),
    ],
)
def test_failures(body: str, message: str, tmp_path: Path) -> None:
    binary = _binary(tmp_path / "bench", body)
    with pytest.raises(LlamaBenchError, match=message):
        time_llama_bench(binary, tmp_path / "m.gguf", 12, 5, threads=1, rounds=1)
    with pytest.raises(LlamaBenchError, match="nothing cannot be run"):
        time_llama_bench(tmp_path / "nothing", tmp_path / "m.gguf", 12, 5, threads=1, rounds=1)


def test_rows_of_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    binary = _binary(tmp_path / "bench", _GOOD)
    arguments = [
        "whole-model",
        "--shape",
        "tiny",
        "--bpw",
        "1",
        "--forms",
        "plain",
        "--dense",
        "--tokens",
        "3",
    ]
    arguments += ["--rounds", "2", "--threads", "1", "--layers", "2", "--prompt", "3", "8"]
    out = tmp_path / "out.json"
    more = ["--llama-bench", str(binary), "--llama-bench-prompt", "5", "--json", str(out)]
    assert main([*arguments, *more]) == 0
    rows = {(row["name"], row["prompt"]): row for row in json.loads(out.read_text())["rows"]}
    assert ("llama.cpp Q1_0, 4 layers", 3) not in rows  # 704 columns are no multiple of 128
    assert "not measured: llama.cpp Q1_0: columns must be a multiple of 128" in capsys.readouterr().err
    row = rows["llama.cpp Q4_0", 3]
    assert row["measured_layers"] == [2, 4]
    assert row["layers"] == 2
    assert row["samples"] == pytest.approx([2e-3, 3e-3])
    assert "llama.cpp Q4_0" in rows["packed 1 bpw, plain", 3]["speedups"]
    assert ("llama.cpp Q4_0", 8) not in rows
