"""NanoQuant's salient columns in whole models: loaded, run, saved, trained around or refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import littlebit2
from littlebit2 import cli
from littlebit2.architecture.salient import SalientLinear
from littlebit2.checkpoint import CheckpointError, convert, open_checkpoint
from littlebit2.integrations.modules import layers_of
from littlebit2.train.recipe.student import check_start
from littlebit2_kernels import LittleBitLinear
from tests.integrations import upstream
from tests.integrations.families import dense_model, outputs, relative_error, token_ids

LAYER = "model.layers.1.mlp.up_proj"
SALIENT = ("model.layers.0.self_attn.q_proj", LAYER)


@pytest.fixture(scope="module")
def nanoquant(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A folder as NanoQuant writes it, two layers with salient columns; the dense model it stands for."""
    path = tmp_path_factory.mktemp("nanoquant")
    dense = dense_model("llama")
    random = upstream.np.random.default_rng(7)
    state = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    with torch.no_grad():
        for name, linear in dense.named_modules():
            if not isinstance(linear, torch.nn.Linear) or name == "lm_head":
                continue
            del state[f"{name}.weight"]
            n, k = linear.weight.shape
            signs = [random.choice([-1.0, 1.0], shape) for shape in ((n, 16), (16, k))]
            pre, post = random.uniform(0.05, 0.1, k), random.uniform(0.2, 0.4, n)
            index = random.permutation(k)[:5]
            if name in SALIENT:
                pre[index] = 0
            weight = upstream.np.diag(post) @ signs[0] @ signs[1] @ upstream.np.diag(pre)
            for matrix, values in zip("UV", signs, strict=True):
                state[f"{name}.{matrix}_packed"] = upstream.pack(values)
                state[f"{name}.{matrix}_shape"] = torch.tensor(values.shape)
            state[f"{name}.scale_pre"] = torch.from_numpy(pre)[None].float()
            state[f"{name}.scale_post"] = torch.from_numpy(post)[None].float()
            if name in SALIENT:
                columns = torch.from_numpy(random.integers(-127, 128, (n, 5))).to(torch.int8)
                scale = torch.from_numpy(random.uniform(0.001, 0.01, 5)).half()
                state[f"{name}.salient_idx"] = torch.from_numpy(index).int()
                state[f"{name}.salient_weight"], state[f"{name}.salient_scale"] = columns, scale
                weight[:, index] += columns.double().numpy() * scale.double().numpy()
            linear.weight.copy_(torch.from_numpy(weight))
    dense.config.save_pretrained(path)
    torch.save(state, path / "pytorch_model.bin")
    return path, dense


def salient_of(model: Any) -> dict[str, SalientLinear]:
    return {name: one for name, one in model.named_modules() if isinstance(one, SalientLinear)}


@pytest.mark.parametrize("way", ["load", "from_pretrained", "converted", "saved", "copied"])
def test_outputs_are_those_of_the_dense_model(nanoquant: tuple[Path, Any], tmp_path: Path, way: str) -> None:
    path, dense = nanoquant
    if way == "from_pretrained":
        littlebit2.register()
        model = transformers.AutoModelForCausalLM.from_pretrained(path)
    elif way == "converted":
        convert(path, tmp_path / "ours", "littlebit2")
        model = littlebit2.load(tmp_path / "ours")
    else:
        model = littlebit2.load(path)
    if way == "saved":
        model.save_pretrained(tmp_path / "again")
        model = littlebit2.load(tmp_path / "again")
        stored = json.loads((tmp_path / "again/config.json").read_text())["quantization_config"]
        assert stored["salient_columns"] == dict.fromkeys(SALIENT, 5)
        assert f"{LAYER}.linear" in stored["ranks"]
    elif way == "copied":
        model = copy.deepcopy(model)
    assert set(salient_of(model)) == set(SALIENT)
    assert len(layers_of(model)) == 14
    ids = token_ids(rows=2)
    assert relative_error(outputs(model, ids), outputs(dense, ids)) < 2e-5
    for name, layer in salient_of(model).items():
        torch.testing.assert_close(layer.dequantize(), dense.get_submodule(name).weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bits(nanoquant: tuple[Path, Any], dtype: torch.dtype) -> None:
    path, dense = nanoquant
    model = littlebit2.load(path, dtype=dtype)
    assert model.get_submodule(LAYER).salient_weight.dtype == dtype
    wanted, ids = outputs(dense, token_ids()), token_ids()
    lower = relative_error(outputs(copy.deepcopy(dense).to(dtype), ids), wanted)
    assert relative_error(outputs(model, ids), wanted) < max(3 * lower, 0.02)


def test_layers_beside_are_fused_and_others_prepacked(nanoquant: tuple[Path, Any]) -> None:
    model = littlebit2.load(nanoquant[0])
    attention = model.model.layers[0].self_attn
    assert attention.q_proj.linear._group is None
    assert attention.k_proj._group.members == (attention.k_proj, attention.v_proj)
    assert all("prepacked" in layer._buffers for layer in layers_of(model).values())


def test_inspect_lists_them(nanoquant: tuple[Path, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", str(nanoquant[0])]) == 0
    shown = capsys.readouterr().out
    (line,) = [line for line in shown.splitlines() if "up_proj.linear" in line]
    assert "16 and 5 columns" in line
    assert "salient 0.00" in shown


def test_a_state_dict_without_files_is_refused(nanoquant: tuple[Path, Any], tmp_path: Path) -> None:
    model = littlebit2.load(nanoquant[0])
    model.save_pretrained(tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"q_proj has salient columns, which are read from files only"):
        transformers.LlamaForCausalLM.from_pretrained(None, config=config, state_dict=model.state_dict())


def test_training_from_them_is_refused(nanoquant: tuple[Path, Any]) -> None:
    with pytest.raises(ValueError, match=r"start .* got layer model\.layers\.0\.self_attn\.q_proj with 5 of"):
        check_start(nanoquant[0])


def test_a_missing_tensor_is_named(nanoquant: tuple[Path, Any], tmp_path: Path) -> None:
    convert(nanoquant[0], tmp_path / "ours", "littlebit2")
    from safetensors.torch import load_file, save_file

    file = tmp_path / "ours/model.safetensors"
    tensors = load_file(file)
    for leaf in ("salient_idx", "salient_weight"):
        del tensors[f"{LAYER}.{leaf}"]
    save_file(tensors, file, {"format": "pt"})
    for load in (littlebit2.load, open_checkpoint):
        with pytest.raises(CheckpointError, match=rf"salient_columns of layer {LAYER}: expected 5"):
            load(tmp_path / "ours")


def test_adapters_beside_them(nanoquant: tuple[Path, Any]) -> None:
    peft = pytest.importorskip("peft")
    from littlebit2.integrations.peft import LoraLittleBitLinear, with_packed_layers

    model = littlebit2.load(nanoquant[0])
    before = outputs(model, token_ids())
    config = with_packed_layers(peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    adapted = peft.get_peft_model(model, config)
    layer = adapted.base_model.model.get_submodule(LAYER)
    assert isinstance(layer, LoraLittleBitLinear)
    assert isinstance(layer.get_base_layer(), SalientLinear)
    assert isinstance(layer.get_base_layer().linear, LittleBitLinear)
    torch.testing.assert_close(outputs(adapted, token_ids()), before)


def test_decode_step_compiles_without_breaks(nanoquant: tuple[Path, Any]) -> None:
    model = littlebit2.load(nanoquant[0])
    ids = token_ids()
    wanted = outputs(model, ids)
    compiled = torch.compile(model.forward, backend="aot_eager", fullgraph=True)
    with torch.inference_mode():
        got = compiled(ids, use_cache=False).logits
    assert relative_error(got, wanted) < 2e-5
