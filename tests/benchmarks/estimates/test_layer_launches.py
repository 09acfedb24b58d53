"""The launches of a decoder layer: what is counted, and that fused calls leave out what they contain."""

from __future__ import annotations

from benchmarks.estimates.layer_launches import count_operators, launches, packed_launches


def test_packed_layers_take_two_launches_a_call_or_four_with_conversions() -> None:
    for tokens, each in ((1, 2), (4, 2), (5, 4), (16, 4)):
        assert packed_launches("apart", tokens, "H200") == 7 * each
        assert packed_launches("grouped", tokens, "H200") == 4 * each


def test_fused_calls_leave_out_norms_activation_and_residuals() -> None:
    operators = count_operators()
    # To float32, square, mean, sum, root, product, to bfloat16, product; of two norms.
    assert operators["norms"] == 16
    assert (operators["activation and product"], operators["residual sums"]) == (2, 2)
    table = launches(1, "H200")
    assert table["all"]["apart"] - table["all"]["grouped"] == 6
    assert table["all"]["grouped"] - table["all"]["fused"] == 20
    assert 2 * table["all"]["fused"] <= table["all"]["apart"]
