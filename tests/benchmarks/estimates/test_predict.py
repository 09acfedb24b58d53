from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.__main__ import main
from benchmarks.estimates.decode_calls import predict
from benchmarks.estimates.model_steps import predict_group, predict_model
from benchmarks.estimates.prefill_calls import predict_prefill
from benchmarks.estimates.rates import RATES
from benchmarks.records import read_result
from benchmarks.shapes import LLAMA_SHAPES
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


def test_counts_of_a_prefill() -> None:
    # V: 296 x 1100 and 40 x 1100, 9 indices of 128 columns; U: 700 x 296 and 700 x 40, 3 and 1.
    packed = make_packed(1100, 700, [296, 40])
    prediction = predict_prefill(packed, "A100", 200)
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
    assert prediction.dense_seconds < predict_prefill(packed, "A100", 20000).dense_seconds
    assert prediction.unpack_seconds > prediction.low_rank_seconds
    wide = make_packed(1100, 700, [2000])
    many = predict_prefill(wide, "A100", 20000, "int8")
    assert many.launches == 4 * -(-20000 // many.explanation.token_block)


def test_counts_of_both_stages_in_one_kernel() -> None:
    # V: 40 x 4096 and 280 x 4096, 32 indices, 3 and 18 tiles of 16 rows; U: 4000 x 40 and 4000 x 280, 1 and 3
    # indices, 125 units of two tiles; 16 tiles of 32 tokens, of 4 groups each.
    packed = make_packed(4096, 4000, [40, 280])
    prediction = predict_prefill(packed, "H200", 500)
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


def test_calls_of_other_kernels_are_refused() -> None:
    packed = make_packed(512, 512, [64])
    for tokens, activation in ((16, "auto"), (64, "int16")):
        with pytest.raises(ValueError, match="must be of a call that takes the GEMM, got"):
            predict_prefill(packed, "H200", tokens, activation)
    with pytest.raises(ValueError, match="gpu must be one of A100, 4090, H100, H200, got 'B200'"):
        predict_prefill(packed, "B200", 64)
    single = predict_prefill(make_packed(512, 512, None), "H200", 64)
    assert (single.launches, single.used) == (2, 1.0)


def test_prediction_of_a_group() -> None:
    layers = [(4096, [144, 144]), (1024, [80])]
    together = predict_group(4096, layers, "H200")
    alone = [predict_group(4096, [layer], "H200") for layer in layers]
    assert (together.launches, [one.launches for one in alone]) == (2, [2, 2])
    assert together.nbytes == sum(one.nbytes for one in alone)
    assert together.seconds < sum(one.seconds for one in alone)
    words = (144 * 2 + 80) * 128 + 4096 * 5 * 2 + 1024 * 3
    assert together.nbytes == 4 * (words + 3 * 4096 + 2 * (144 + 4096) + 80 + 1024)
    with pytest.raises(ValueError, match="gpu must be one of A100, 4090, H100, H200, got 'B200'"):
        predict_group(4096, layers, "B200")


def test_prediction_of_a_model() -> None:
    shape = LLAMA_SHAPES["llama3-8b"]
    fused, alone = (predict_model(shape, 0.1, "A100", fused=fused) for fused in (True, False))
    assert (fused.launches, alone.launches) == (32 * 4 * 2, 32 * 7 * 2)
    assert fused.nbytes == alone.nbytes
    assert fused.seconds < alone.seconds
    macs = 32 * 4096 * (4096 + 1024 + 1024 + 4096 + 3 * 14336)
    assert shape.linear_macs(32) == macs
    assert fused.dense_seconds == 2 * macs / RATES["A100"].memory


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "predictions.json"
    small = ["--shapes", "512,256", "--models", "tiny", "--bpw", "1.0", "--tokens", "32", "128"]
    assert main(["predict", "--gpu", "H200", "4090", *small, "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "| H200 | 512->256 | 1   | int16 " in printed
    assert "| 4090 | 512->256 | 1   | float16 | 128 " in printed
    assert "| H200 | tiny " in printed
    content = read_result(path, ("predict",))
    assert [len(content[part]) for part in ("decode", "prefill", "models")] == [2, 4, 2]
    assert all(sum(row["seconds"]) > 0 for row in content["decode"])
    assert all(row["seconds"] > 0 for row in content["prefill"])

    assert main(["predict", "models", "--gpu", "H200", "--models", "tiny", "--bpw", "1.0"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("predicted, ") == 1
    assert main(["predict", "training"]) == 2
    assert "PART must be one of decode, prefill, models, got training" in capsys.readouterr().err
