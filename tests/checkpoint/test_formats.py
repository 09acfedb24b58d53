"""The registry of layouts: which one claims a layer, what fits none, and what a new one needs."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import numpy as np
import pytest
import torch

from littlebit2.checkpoint import CheckpointError, open_checkpoint
from littlebit2.checkpoint.formats import LAYOUTS, Layout, registry
from littlebit2.checkpoint.formats.layout import Leaves, Modules
from littlebit2_kernels.reference import dense_weight
from tests.checkpoint import wild

CLAIMS = {
    "nanoquant": ("U_packed", "V_packed", "scale_pre", "scale_post"),
    "nanoquant-prepared": ("U_int8", "V_int8"),
    "littlebit-latent": ("U", "V", "u1", "u2", "v1", "v2"),
    "littlebit": ("U_packed", "V_packed", "u1", "u2", "v1", "v2"),
    "littlebit-residual": ("U_R_packed",),
    "littlebit-without-u": ("V_packed", "u1", "u2", "v1", "v2"),
    "littlebit2": ("U_packed", "V_packed", "u1", "v2", "latent_scale"),
    "littlebit2-shared": ("U_packed", "U_packed_R", "V_shared_R", "V_packed", "latent_scale"),
    "littlebit2-without-u": ("V_packed", "u1", "v2", "latent_scale"),
    "onebit": ("V_packed", "V_shape", "u1", "v2"),
    "dense": ("weight", "bias"),
    "dense-named-u": ("U", "V"),
}


@pytest.mark.parametrize("case", CLAIMS)
def test_the_first_layout_that_claims_a_layer(case: str) -> None:
    leaves = CLAIMS[case]
    found = next((layout.name for layout in LAYOUTS if layout.claims(leaves)), "dense")
    expected = [name for name in (*(layout.name for layout in LAYOUTS), "dense") if case.startswith(name)]
    assert found == max(expected, key=len)


@pytest.mark.parametrize(
    ("leaf", "tensor"),
    [
        ("weight_packed", torch.zeros(4, 4, dtype=torch.int32)),
        ("bp", torch.zeros(16, dtype=torch.uint8)),
        ("sign", torch.zeros(4, 4, dtype=torch.int8)),
        ("w_binary", torch.zeros(4, 4, dtype=torch.bool)),
        ("u_sign_rt", torch.zeros(40, 1, dtype=torch.int32)),
        ("qweight", torch.zeros(4, 4, dtype=torch.int64)),
        ("weight", torch.zeros(8, 4, dtype=torch.int8)),
        ("gate_up_proj_blocks", torch.zeros(2, 4, 4, dtype=torch.uint8)),
        ("codes", torch.zeros(9, dtype=torch.uint16)),
    ],
)
def test_what_looks_binary_and_fits_no_layout_is_named(
    tmp_path: Path, leaf: str, tensor: torch.Tensor
) -> None:
    wild.write(tmp_path, {f"m.a.{leaf}": tensor, "m.b.weight": torch.ones(2, 2)})
    with pytest.raises(
        CheckpointError,
        match=rf"a layout that is read \(dbf, .*onebit.*\), got what looks like others: .* m\.a\.{leaf} ",
    ):
        open_checkpoint(tmp_path)


def test_dense_tensors_of_such_names_are_dense(tmp_path: Path) -> None:
    tensors = {
        "a.sign": torch.ones(3),  # floats
        "a.bits": torch.tensor([1]),
        "b.position_ids": torch.arange(8)[None],
        "b.relative_position_index": torch.zeros(9, 9, dtype=torch.int32),
        "b.bias": torch.ones(1, 1, 9, 9, dtype=torch.uint8),  # the causal mask of GPT-2
        "b.masked_bias": torch.tensor(-1e4),
        "b.num_batches_tracked": torch.tensor(1, dtype=torch.int32),
        "b.weight": torch.ones(4, 4, dtype=torch.float8_e4m3fn),
    }
    wild.write(tmp_path, tensors)
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.format == "dense"
        assert set(checkpoint.dense) == set(tensors)


class Spread(Layout):
    """A layout that is no one's, a layer of which is spread over several modules."""

    name = "spread"
    settings_file = "spread.json"

    def claims(self, leaves: Collection[str]) -> bool:
        return False

    def find(self, modules: Modules) -> dict[str, Leaves]:
        roots = {module.rpartition(".")[0] for module, leaves in modules.items() if "held" in leaves}
        return {
            root: {
                f"{part}.{leaf}": entry
                for part in ("0", "1", "2", "3", "4")
                for leaf, entry in modules[f"{root}.{part}"].items()
            }
            for root in roots
        }

    def rename(self, leaf: str) -> str:
        return {"0.w": "v2", "1.held": "V_packed", "2.w": "latent_scale", "3.held": "U_packed", "4.w": "u1"}[
            leaf
        ]


def test_a_layer_may_be_spread_over_modules(
    tmp_path: Path, nprng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "LAYOUTS", (*LAYOUTS, Spread()))
    layer = wild.random_layer(nprng, 50, 36, [20])
    (path,) = layer.paths
    state = {
        "0.w": torch.from_numpy(path.v2).float(),
        "1.held": wild.pack(path.v),
        "2.w": torch.from_numpy(path.v1 * path.u2).float(),
        "3.held": wild.pack(path.u),
        "4.w": torch.from_numpy(path.u1).float(),
    }
    wild.write(tmp_path, wild.prefixed({"m.up": state}) | {"m.norm.weight": torch.ones(50)})
    (tmp_path / "spread.json").write_text('{"bits": 1}')
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.format == "spread"
        assert checkpoint.metadata == {"bits": 1, "source": "spread.json"}
        assert list(checkpoint.layers) == ["m.up"]
        assert checkpoint.layers["m.up"].shape.ranks == (24,)
        assert list(checkpoint.dense) == ["m.norm.weight"]
        weight = dense_weight(checkpoint.load_layer("m.up"), torch.float64).numpy()
        np.testing.assert_allclose(weight, layer.dense(), rtol=1e-6)
