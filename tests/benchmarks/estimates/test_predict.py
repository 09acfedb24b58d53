from __future__ import annotations

import pytest

from benchmarks.__main__ import main
from benchmarks.estimates.predict import RATES, predict
from benchmarks.estimates.predict_prompts import predict_prompt
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


def test_counts_of_a_prompt() -> None:
    # V: 296 x 1100 and 40 x 1100, 9 indices of 128 columns; U: 700 x 296 and 700 x 40, 3 and 1.
    packed = make_packed(1100, 700, [296, 40])
    prediction = predict_prompt(packed, "A100", 200)
    first, last = prediction.explanation.launches[1], prediction.explanation.launches[3]
    rows = sum(-(-rank // first.row_tile) * first.row_tile for rank in (296, 40))
    tokens = [-(-200 // launch.token_tile) * launch.token_tile for launch in (first, last)]
    outputs = -(-700 // last.row_tile) * last.row_tile
    mmas = rows // 16 * tokens[0] // 8 * 9 * 8 + outputs // 16 * tokens[1] // 8 * (3 + 1) * 8
    assert prediction.counts.mmas == mmas
    assert prediction.used == prediction.explanation.macs / (mmas * 16 * 8 * 16)
    assert 0 < prediction.used < 1
    parts = 3 if first.grid[1] > 1 else 1
    assert prediction.counts.converted_bytes == 200 * (2 * 1100 * 4 + (296 + 40) * (4 * parts + 2))
    assert prediction.launches == 4
    assert prediction.dense_seconds < predict_prompt(packed, "A100", 20000).dense_seconds
    assert prediction.unpack_seconds > prediction.low_rank_seconds
    wide = make_packed(1100, 700, [2000])
    many = predict_prompt(wide, "A100", 20000, "int8")
    assert many.launches == 4 * -(-20000 // many.explanation.token_block)


def test_counts_of_both_stages_in_one_kernel() -> None:
    # V: 40 x 4096 and 280 x 4096, 32 indices, 3 and 18 tiles of 16 rows; U: 4000 x 40 and 4000 x 280, 1 and 3
    # indices, 125 units of two tiles; 16 tiles of 32 tokens, of 4 groups each.
    packed = make_packed(4096, 4000, [40, 280])
    prediction = predict_prompt(packed, "H200", 500)
    assert prediction.explanation.kernels == "fused"
    (launch,) = prediction.explanation.launches
    assert (launch.kind, launch.token_tile, launch.grid[0], launch.grid[2]) == ("fused", 32, 1, 16)
    mmas = 16 * 4 * 8 * ((3 + 18) * 32 + 250 * (1 + 3))
    assert prediction.counts.mmas == mmas
    assert prediction.used == prediction.explanation.macs / (mmas * 16 * 8 * 16)
    assert prediction.counts.sign_bytes == 16 * 4 * (320 * 128 + 4000 * (2 + 9))
    assert (prediction.counts.converted_bytes, prediction.counts.copied_bytes) == (0, 0)
    assert prediction.launches == 1
    assert prediction.explanation.workspace_bytes == 0


def test_what_is_no_prompt() -> None:
    packed = make_packed(512, 512, [64])
    for tokens, activation in ((16, "auto"), (64, "int16")):
        with pytest.raises(ValueError, match="must be of a call that takes the GEMM, got"):
            predict_prompt(packed, "H200", tokens, activation)
    with pytest.raises(ValueError, match="gpu must be one of A100, 4090, H100, H200, got 'B200'"):
        predict_prompt(packed, "B200", 64)
    single = predict_prompt(make_packed(512, 512, None), "H200", 64)
    assert (single.launches, single.used) == (2, 1.0)


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", "--gpu", "H200", "4090", "--shapes", "512,256", "--bpw", "1.0"]) == 0
    printed = capsys.readouterr().out
    assert "| H200 | 512->256" in printed
    assert "| 4090 | 512->256" in printed
    command = ["predict", "--gpu", "H200", "--shapes", "512,256", "--bpw", "1.0", "--tokens", "32", "128"]
    assert main(command) == 0
    assert "| float16 | 128" in capsys.readouterr().out
