"""``python -m benchmarks load-memory``, and what it holds of ``littlebit2.load``."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks.__main__ import main
from benchmarks.commands import command_parser
from benchmarks.models.load_memory import LoadMemory, measure, model_config
from benchmarks.records import read_result
from littlebit2 import synthesize

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def test_a_small_model_is_written_kept_and_loaded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--layers", "1", "--experts", "4", "--hidden", "256", "--inner", "96", "--vocabulary", "64"]
    arguments = ["load-memory", *sizes, "--bpw", "1", "--folder", str(tmp_path / "model")]
    assert main([*arguments, "--json", str(tmp_path / "result.json")]) == 0
    assert main(arguments) == 0
    assert capsys.readouterr().err.count("written in") == 1
    found = read_result(tmp_path / "result.json", ["load-memory"])["load"]
    assert found["layers"] == 4 + 3 * 4
    assert 0 < found["packed"] < found["files"]
    assert found["touched"] >= found["peak"] > found["before"]


@pytest.mark.slow
def test_memory_grows_by_little_more_than_the_files(tmp_path: Path) -> None:
    # Dense and packed bytes are as 3 to 1, as in the model of 48 layers; what every load takes cancels out.
    found: list[LoadMemory] = []
    for layers in (2, 6):
        options = command_parser("load-memory").parse_args(
            ["--layers", str(layers), "--vocabulary", str(3125 * layers)]
        )
        synthesize(model_config(options), tmp_path / str(layers), options.bpw, paths=options.paths)
        found.append(measure(tmp_path / str(layers)))
    small, large = found
    memory = (large.touched - large.before) - (small.touched - small.before)
    assert memory <= 1.2 * (large.files - small.files)
