"""A plan says what ``quantize`` will do: the same layers, names, ranks and reasons."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from littlebit2.offline import quantize_checkpoint
from littlebit2.plan import plan_model
from littlebit2.quantize import QuantConfig
from tests.integrations.families import dense_model
from tests.integrations.models.moe import MIXTURES, OTHERS, QUANT, make


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "deepseek_v3", "vit", "t5"])
def test_a_plan_of_a_directory_is_what_quantize_does(name: str, tmp_path: Path) -> None:
    make(name).save_pretrained(tmp_path / "dense")
    plan = plan_model(tmp_path / "dense", QUANT)
    report = quantize_checkpoint(tmp_path / "dense", tmp_path / "q", QUANT, progress=False)
    planned = {layer.name: list(layer.ranks) for layer in plan.layers}
    assert planned == {layer["name"]: list(layer["ranks"]) for layer in report.layers}
    assert {reason: sorted(names) for reason, names in plan.reasons.items()} == {
        reason: sorted(names) for reason, names in report.reasons.items()
    }


@pytest.mark.parametrize("name", [*MIXTURES, *OTHERS])
def test_a_configuration_is_enough(name: str) -> None:
    model = make(name)
    config = {**model.config.to_dict(), "architectures": [type(model).__name__]}
    plan = plan_model(config, QUANT)
    weights = sum(layer.in_features * layer.out_features for layer in plan.layers)
    total = sum(parameter.numel() for parameter in model.parameters())
    size = plan.bytes()
    assert size["linear_fp16"] == 2 * weights
    assert size["model_fp16"] == 2 * total
    if name in MIXTURES:
        experts = [layer for layer in plan.layers if ".experts." in layer.name]
        assert len({layer.name for layer in experts}) == len(experts) > 0


def test_layers_that_are_too_small_are_given_with_the_reason(tmp_path: Path) -> None:
    make("deepseek_v3").save_pretrained(tmp_path)
    plan = plan_model(tmp_path, QuantConfig(bpw=2.0, paths=2))
    small = plan.reasons["too small for the budget"]
    assert small
    assert set(small) <= {shape.name for shape in plan.left_dense}
    assert not set(small) & {layer.name for layer in plan.layers}


def test_models_that_transformers_does_not_know(tmp_path: Path) -> None:
    make("mixtral").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["model_type"] = "nobody_knows"
    (tmp_path / "config.json").write_text(json.dumps(config))
    plan = plan_model(tmp_path, QUANT)
    assert len(plan.layers) == 2 * (4 + 4 * 3)
    assert "the names of their tensors alone" in plan.notes[0]
    with pytest.raises(ValueError, match="give the directory of the model, with its weights"):
        plan_model(config, QUANT)


_WITHOUT = """
import sys
sys.modules["transformers"] = None
from littlebit2.cli import main
sys.exit(main(sys.argv[1:]))
"""


def without_transformers(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", _WITHOUT, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_without_transformers_names_decide() -> None:
    expected = plan_model("llama-3-8b", QuantConfig(bpw=0.55))
    done = without_transformers("plan", "llama-3-8b", "--bpw", "0.55", "--json")
    plan = json.loads(done.stdout)
    assert [layer["name"] for layer in plan["layers"]] == [layer.name for layer in expected.layers]
    assert plan["bytes"] == expected.bytes()
    assert plan["notes"] == [
        "transformers is not installed: layers are chosen by the names of their tensors alone"
    ]


def test_without_transformers_missing_weights_are_refused_too(tmp_path: Path) -> None:
    dense_model("llama").save_pretrained(tmp_path / "dense")
    file = tmp_path / "dense/model.safetensors"
    options = ("--ranks", "16", "--method", "dual-svid", "--quiet")
    assert without_transformers("quantize", str(file.parent), str(tmp_path / "a"), *options).returncode == 0
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, file, {"format": "pt"})
    done = without_transformers("quantize", str(file.parent), str(tmp_path / "b"), *options)
    assert done.returncode == 1
    assert "the files lack weights of a llama: model.layers.1.mlp.up_proj.weight" in done.stderr
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("package", "module", "extra"),
    [("transformers", "loading", "models"), ("transformers", "peft", "models"), ("peft", "peft", "train")],
)
def test_imports_of_integrations_name_the_extra(package: str, module: str, extra: str) -> None:
    code = f"import sys; sys.modules[{package!r}] = None; import littlebit2.integrations.{module}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert f"{package} is not installed; pip install 'littlebit2-kernels[{extra}]'" in done.stderr
