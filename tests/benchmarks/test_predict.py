from __future__ import annotations

import pytest

from benchmarks.__main__ import main
from benchmarks.predict import RATES, predict
from littlebit2_kernels.testing import make_packed


def test_counts_of_a_layer() -> None:
    # V: 296 x 1100 and 40 x 1100, 3 slices; U: 700 x 296 and 700 x 40, a slice each.
    prediction = predict(make_packed(1100, 700, [296, 40]), "H200")
    tiles = (19 + 3) * 3 + 44 + 44
    assert (prediction.mmas, prediction.sign_loads, prediction.shared_loads) == (
        4 * tiles,
        2 * tiles,
        2 * tiles,
    )
    words = ((296 + 40) * 35, 700 * (10 + 2))
    assert prediction.nbytes == (4 * (words[0] + 2 * 1100), 4 * (words[1] + 296 + 40 + 2 * 700))
    first, last = prediction.explanation.launches
    assert prediction.staged == 3 * first.grid[0] + 2 * last.grid[0]
    assert len(prediction.seconds) == 2
    assert prediction.dense_seconds == 2 * 1100 * 700 / RATES["H200"].memory


def test_shared_and_single_stages() -> None:
    shared = predict(make_packed(512, 512, [64, 64], share_v=True), "A100", "float16")
    assert shared.mmas == 32 * (4 + 2 * 32)
    single = predict(make_packed(512, 512, None), "A100", "exact")
    assert (single.mmas, len(single.seconds)) == (32 * 32, 1)
    with pytest.raises(ValueError, match="gpu must be one of A100, 4090, H100, H200, got 'B200'"):
        predict(make_packed(512, 512, [8]), "B200")


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", "--gpu", "H200", "4090", "--shapes", "512,256", "--bpw", "1.0"]) == 0
    printed = capsys.readouterr().out
    assert "| H200 | 512->256" in printed
    assert "| 4090 | 512->256" in printed
