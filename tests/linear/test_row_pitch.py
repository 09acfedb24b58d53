"""Rows of words at multiples of 16 bytes, as layers on a GPU hold them; shown on the CPU, which reads any."""

from __future__ import annotations

import copy
import io

import pytest
import torch

from littlebit2_kernels import LittleBitLinear, linear, littlebit_linear
from littlebit2_kernels.format import pitched_words
from littlebit2_kernels.state import packed_to_state
from littlebit2_kernels.testing import make_problem


@pytest.mark.parametrize("count", [1, 3, 4, 5, 8, 10])
def test_rows_start_at_multiples_of_16_bytes(rng: torch.Generator, count: int) -> None:
    words = torch.randint(-(2**31), 2**31 - 1, (7, count), dtype=torch.int32, generator=rng)
    for given in (words, words.T.contiguous().T, torch.cat([words, words], dim=1)[:, :count]):
        pitched = pitched_words(given)
        assert torch.equal(pitched, words)
        assert pitched.stride(1) == 1
        assert all(pitched[row].data_ptr() % 16 == 0 for row in range(7))
        assert pitched_words(pitched) is pitched


def test_a_layer_with_pitched_rows(rng: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    x, packed = make_problem(3, 100, 70, [40, 296], bias=True, generator=rng)
    expected = littlebit_linear(x, packed)
    dense = {name: tensor.clone() for name, tensor in packed_to_state(packed).items()}
    monkeypatch.setattr(linear, "_PITCHED_DEVICES", ("cpu",))
    layer = LittleBitLinear.from_packed(packed, auto_prepack=False)
    later = LittleBitLinear(100, 70, [40, 296], auto_prepack=False)
    later.load_state_dict(layer.state_dict())
    assigned = LittleBitLinear(100, 70, [40, 296], auto_prepack=False, device="meta")
    assigned.load_state_dict(layer.state_dict(), assign=True)
    monkeypatch.setattr(linear, "_PITCHED_DEVICES", ())
    moved = LittleBitLinear.from_packed(packed, auto_prepack=False)
    assert moved.U_packed_R.is_contiguous()
    monkeypatch.setattr(linear, "_PITCHED_DEVICES", ("cpu",))
    moved.to("cpu")
    dense_file = io.BytesIO()
    monkeypatch.setattr(linear, "_PITCHED_DEVICES", ())
    torch.save(LittleBitLinear.from_packed(packed, auto_prepack=False), dense_file)
    monkeypatch.setattr(linear, "_PITCHED_DEVICES", ("cpu",))
    dense_file.seek(0)
    loaded = torch.load(dense_file, weights_only=False)
    assert layer.nbytes == LittleBitLinear.from_packed(packed).nbytes
    for module in (layer, later, assigned, moved, copy.deepcopy(layer), loaded):
        assert module.U_packed_R.stride(0) == 12
        assert torch.equal(module(x), expected)
        state = module.state_dict()
        assert state.keys() == dense.keys()
        for name, tensor in state.items():
            assert tensor.is_contiguous(), name
            assert torch.equal(tensor, dense[name]), name
        assert torch.equal(module.packed.paths[1].u, packed.paths[1].u)
