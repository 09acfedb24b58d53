"""``python -m benchmarks serving``: what it refuses and prints. It runs vLLM, which is not installed here."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest

from benchmarks.__main__ import main
from benchmarks.commands import command_parser
from benchmarks.models.serving import Throughput, model_config, table
from littlebit2.integrations.skeleton import skeleton


def _options(*arguments: str) -> Namespace:
    return command_parser("serving").parse_args(list(arguments))


def test_the_default_model_is_one_that_can_be_built() -> None:
    model = skeleton(model_config(_options()))
    parameters = sum(one.numel() for one in model.parameters())
    assert 90e6 < parameters < 120e6


def test_table() -> None:
    found = [
        Throughput("dense bfloat16", 3 << 20, {"1": 10.4, "16": 99.5}, 1000.0),
        Throughput("packed 0.55 bpw", 1 << 20, {"1": 20.0, "16": 150.0}, 900.0),
    ]
    head, _, dense, packed = table(found).splitlines()
    assert [cell.strip() for cell in head.strip("|").split("|")] == [
        *("model", "MiB", "decode, batch 1", "decode, batch 16", "prefill")
    ]
    assert [cell.strip() for cell in dense.strip("|").split("|")] == [
        "dense bfloat16",
        "3",
        "10",
        "100",
        "1000",
    ]
    assert "packed 0.55 bpw" in packed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tokens", "1"], "tokens must be at least 2"),
        (["--python", "no/such/python"], "python must be an interpreter, got no/such/python"),
    ],
)
def test_refuses(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["serving", *arguments, "--folder", str(tmp_path)]) != 0
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
