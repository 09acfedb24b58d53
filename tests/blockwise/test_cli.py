"""``littlebit2 quantize`` with text, and what it says of the result."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import re
from pathlib import Path

import pytest

from littlebit2.blockwise import BlockwiseReport, BlockwiseSettings
from littlebit2.cli import main
from littlebit2.cli.blockwise import _SETTINGS, blockwise_outlook
from littlebit2.offline import RunReport
from tests.blockwise.builders import write_data, write_model

QUICK = [
    *("--ranks", "16", "--admm-iterations", "5", "--length", "16", "--samples", "12", "--held-out", "3"),
    *("--steps", "4", "--quiet", "--threads", "1"),
]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("cli")
    return str(write_model(folder / "dense")), str(write_data(folder / "text.txt"))


def test_help_has_the_defaults_of_the_settings() -> None:
    texts = {name: text for _, name, _, _, text in _SETTINGS}
    for field in dataclasses.fields(BlockwiseSettings):
        if field.name in texts and field.default is not None:
            shown = re.search(r"\(default ([\d.e-]+)(: none)?\)", texts[field.name])
            assert shown is not None, field.name
            assert float(shown[1]) == field.default, field.name


def report(perplexity: dict[str, float]) -> BlockwiseReport:
    return BlockwiseReport(RunReport({}, (), ()), {}, (), None, perplexity, 100, 45)


def test_whether_a_result_is_of_use() -> None:
    assert report({"dense": 10.0, "tuned": 50.0}).unusable is None
    assert "more than 5 times the dense 10" in str(report({"dense": 10.0, "tuned": 50.1}).unusable)
    assert "uniform guess among 100" in str(report({"dense": 30.0, "tuned": 100.0}).unusable)
    assert "uniform guess" in str(report({"dense": 10.0, "tuned": math.nan}).unusable)
    assert "the dense model's own perplexity" in str(report({"dense": 130.0, "tuned": 120.0}).unusable)
    assert report({"dense": 10.0, "tuned": 70.0, "distilled": 20.0}).unusable is None


def test_text_makes_it_blockwise(
    inputs: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, data = inputs
    out = str(tmp_path / "out")
    assert main(["quantize", model, out, "--data", data, *QUICK, "--keep-work"]) == 0
    printed = capsys.readouterr()
    assert f"{out}.partial: the work folder, which --keep-work keeps" in printed.out
    assert Path(f"{out}.partial", "littlebit2.lock").is_file()
    # The random model's perplexity on English is far above the size of its vocabulary: no work helps.
    assert "perplexity on 45 held-out tokens: dense" in printed.out
    assert f"warning: {out} is not usable: the dense model's own perplexity" in printed.err
    assert "littlebit2 finetune" not in printed.err
    plot = tmp_path / "run.png"
    assert main(["quantize", model, out, "--data", data, *QUICK, "--json", "--plot", str(plot)]) == 0
    assert plot.read_bytes().startswith(b"\x89PNG")
    content = json.loads(capsys.readouterr().out)
    assert [block["steps"] for block in content["blockwise"]["blocks"]] == [4, 4]
    assert content["settings"]["admm_iterations"] == 5
    assert content["settings"]["refine_rounds"] == 2


@pytest.mark.parametrize(
    ("minutes", "more"), [(None, "more --samples, --steps and --distill-steps,"), (3.0, "more --minutes,")]
)
def test_a_bad_result_of_a_good_model_names_the_next_command(
    minutes: float | None, more: str, capsys: pytest.CaptureFixture[str]
) -> None:
    args = argparse.Namespace(out="OUT", model_dir="DENSE", minutes=minutes)
    blockwise_outlook(report({"dense": 10.0, "tuned": 70.0}), args)
    printed = capsys.readouterr().err
    assert "warning: OUT is not usable: its perplexity 70 is more than 5 times the dense 10" in printed
    assert more in printed
    assert "littlebit2 finetune DENSE TRAINED --data TEXT --start OUT" in printed


def test_without_text_the_summary_says_what_is_needed(
    inputs: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, _ = inputs
    out = str(tmp_path / "out")
    assert main(["quantize", model, out, "--ranks", "16", "--admm-iterations", "5", "--quiet"]) == 0
    printed = capsys.readouterr().out
    assert "until it is trained, or quantized again with text" in printed
    assert f"littlebit2 quantize {model} OUT --data TEXT" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "blockwise"], "--method blockwise needs text: --data PATH"),
        (["--data", "DATA", "--workers", "2"], "--workers: not with --method blockwise"),
        (["--data", "DATA", "--method", "admm"], "--data: only with --method blockwise"),
        (
            ["--data", "DATA", "--minutes", "1", "--steps", "2"],
            "--minutes chooses --samples, --steps and --distill-steps",
        ),
        (["--data", "DATA", "--plot", "a.jpeg"], "plot must end in .pdf, .png, .svg, got 'a.jpeg'"),
        (["--data", "DATA", "--plot", "absent/a.png"], "plot must be in a directory that exists"),
        (["--steps", "3"], "--steps: only with --method blockwise and --data"),
    ],
)
def test_options_that_contradict(
    arguments: list[str],
    message: str,
    inputs: tuple[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, data = inputs
    given = [data if argument == "DATA" else argument for argument in arguments]
    assert main(["quantize", model, str(tmp_path / "out"), *given]) == (1 if "exists" in message else 2)
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
