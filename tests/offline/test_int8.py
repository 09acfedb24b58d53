"""``--head`` and ``--embedding`` of the command line: quantize, plan, convert, synthesize, inspect."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import littlebit2
from littlebit2 import cli
from littlebit2.architecture.int8 import int8_
from littlebit2.checkpoint import open_checkpoint
from tests.integrations.families import dense_model, outputs, token_ids

IDS = token_ids(9, 2)
SIZE = ["--ranks", "8", "--method", "dual-svid", "--quiet"]
INT8 = ["--head", "int8", "--embedding", "int8"]


@pytest.fixture(scope="module", params=["llama", "llama-tied"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dense model, and the same packed, with and without int8 rows."""
    path = tmp_path_factory.mktemp(request.param)
    dense_model(request.param).save_pretrained(path / "dense")
    for name, options in (("kept", []), ("int8", INT8)):
        assert cli.main(["quantize", str(path / "dense"), str(path / name), *SIZE, *options]) == 0
    return path


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    capsys.readouterr()
    assert cli.main(list(arguments)) == 0
    return json.loads(capsys.readouterr().out)


def test_quantized_with_int8_is_the_packed_model_rounded(folder):
    model = littlebit2.load(folder / "kept")
    rows = int8_(model)
    loaded = littlebit2.load(folder / "int8")
    assert torch.equal(outputs(loaded, IDS), outputs(model, IDS))
    with open_checkpoint(folder / "int8") as checkpoint:
        assert set(checkpoint.int8) == set(rows.stored)
        assert not {*checkpoint.config["quantization_config"]["modules_to_not_convert"]} & {*rows.stored}
    report = json.loads((folder / "int8" / "quantization_report.json").read_text())
    assert set(report["reasons"]["int8 rows"]) == set(rows.stored)
    assert report["settings"]["head"] == "int8"


def test_converted_later_is_the_same(folder, tmp_path):
    assert cli.main(["convert", str(folder / "kept"), str(tmp_path / "c"), "--to", "littlebit2", *INT8]) == 0
    assert torch.equal(
        outputs(littlebit2.load(tmp_path / "c"), IDS), outputs(littlebit2.load(folder / "int8"), IDS)
    )
    # A head that is int8 already stays as it is.
    half = str(tmp_path / "half")
    assert cli.main(["convert", str(folder / "kept"), half, "--to", "littlebit2", "--head", "int8"]) == 0
    assert cli.main(["convert", half, str(tmp_path / "both"), "--to", "littlebit2", *INT8]) == 0
    assert torch.equal(
        outputs(littlebit2.load(tmp_path / "both"), IDS), outputs(littlebit2.load(folder / "int8"), IDS)
    )
    # Again: nothing is lost on the way.
    assert cli.main(["convert", str(tmp_path / "c"), str(tmp_path / "d"), "--to", "littlebit2"]) == 0
    assert torch.equal(
        outputs(littlebit2.load(tmp_path / "d"), IDS), outputs(littlebit2.load(tmp_path / "c"), IDS)
    )


def test_sizes_are_those_of_the_files(folder, capsys):
    found = printed(capsys, "inspect", str(folder / "int8"), "--json")
    planned = printed(capsys, "plan", str(folder / "dense"), *SIZE[:-1], *INT8, "--json")
    tied = bool(found["tied"])
    assert found["totals"]["bytes"]["int8"] == sum(one["bytes"] for one in found["int8"].values())
    assert planned["bytes"]["embeddings"] + planned["bytes"]["heads"] == found["totals"]["bytes"]["int8"]
    assert planned["bytes"]["heads"] == (0 if tied else 160 * (64 + 4))
    kept = printed(capsys, "plan", str(folder / "dense"), *SIZE[:-1], "--json")
    assert kept["bytes"]["model_fp16"] == planned["bytes"]["model_fp16"]
    assert kept["bytes"]["total"] > planned["bytes"]["total"]


def test_synthesized(folder, tmp_path, capsys):
    out = str(tmp_path / "s")
    arguments = ["synthesize", str(folder / "dense"), out, "--bpw", "2", "--quiet", *INT8]
    assert cli.main(arguments) == 0
    found = printed(capsys, "inspect", out, "--json")
    with open_checkpoint(folder / "int8") as checkpoint:
        assert set(found["int8"]) == set(checkpoint.int8)
    assert outputs(littlebit2.load(out), IDS).isfinite().all()


def test_refused(folder, tmp_path, capsys):
    def error(*arguments: str) -> str:
        capsys.readouterr()
        assert cli.main(list(arguments)) != 0
        return capsys.readouterr().err

    out = str(tmp_path / "out")
    assert "--to must be littlebit2 for int8 rows" in error(
        "convert", str(folder / "kept"), out, "--to", "littlebit", *INT8
    )
    assert "expected a dense matrix, got int8 rows" in error(
        "convert", str(folder / "int8"), out, "--to", "littlebit"
    )
    with pytest.raises(ValueError, match="head must be 'keep' or 'int8', got 'packed'"):
        littlebit2.quantize_checkpoint(
            folder / "dense", out, littlebit2.QuantConfig(ranks=(8,)), head="packed", progress=False
        )
    dense_model("bert").save_pretrained(tmp_path / "bert")
    assert "BertModel has no output head" in error(
        "quantize", str(tmp_path / "bert"), out, *SIZE, "--head", "int8"
    )
    assert not Path(out).exists()
