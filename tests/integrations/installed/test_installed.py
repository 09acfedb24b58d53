"""transformers in an environment where the package is installed: it loads packed checkpoints, or fails."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import littlebit2
from littlebit2.integrations.transformers import attach
from tests.integrations.families import dense_model, quantized_copy
from tests.integrations.installed.environment import Environment, copy_sources, install, make_environment
from tests.integrations.upstream import write

HOOK = ("_littlebit2_autoregister.py", "littlebit2_autoregister.pth")
PROMPT = [5, 6, 7, 8]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return copy_sources(tmp_path_factory.mktemp("sources") / "tree")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory, sources: Path) -> Environment:
    environment = make_environment(tmp_path_factory.mktemp("installed") / "environment")
    install(environment, sources)
    return environment


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ours, the authors' without the file that says so, and a dense one."""
    folder = tmp_path_factory.mktemp("checkpoints")
    dense = dense_model("llama")
    dense.save_pretrained(folder / "dense")
    packed = quantized_copy(dense)
    attach(packed)
    packed.save_pretrained(folder / "ours")
    write(folder / "theirs", dense, (16, 8))
    write(folder / "said", dense, (16, 8))
    (folder / "theirs/littlebit_config.json").unlink()
    # Words under names that nobody knows.
    shutil.copytree(folder / "theirs", folder / "odd")
    tensors = load_file(folder / "odd/model.safetensors")
    renamed = {
        name.replace("U_packed", "words").replace("V_packed", "bits"): tensor
        for name, tensor in tensors.items()
        if "_R_" not in name and "_shape" not in name
    }
    save_file(renamed, folder / "odd/model.safetensors", {"format": "pt"})
    return folder


def tokens(model: transformers.PreTrainedModel) -> list[int]:
    found = model.generate(torch.tensor([PROMPT]), max_new_tokens=8, do_sample=False)
    return [int(token) for token in found[0, len(PROMPT) :]]


#: Loads each checkpoint as a user does who does not know of us, and prints what it generates.
LOAD = f"""
import json, sys
from pathlib import Path
at_start = sorted({{"torch", "transformers", "littlebit2", "littlebit2_kernels"}} & set(sys.modules))
import torch, transformers
def tokens(model):
    found = model.generate(torch.tensor([{PROMPT}]), max_new_tokens=8, do_sample=False)
    return [int(token) for token in found[0, {len(PROMPT)}:]]
results = {{"at start": at_start}}
for path in map(Path, sys.argv[1:]):
    try:
        results[path.name] = tokens(transformers.AutoModelForCausalLM.from_pretrained(path, dtype="float32"))
    except Exception as error:
        results[path.name] = f"{{type(error).__name__}}: {{error}}"
    results["littlebit2 after " + path.name] = "littlebit2" in sys.modules
print(json.dumps(results))
"""


def test_from_pretrained_knows_packed_checkpoints(installed: Environment, checkpoints: Path) -> None:
    names = ("dense", "theirs", "ours", "odd")
    run = installed.run("-W", "error::RuntimeWarning", "-c", LOAD, *(checkpoints / name for name in names))
    results = json.loads(run.stdout)
    assert results["at start"] == []
    # A dense checkpoint needs nothing of us.
    assert not results["littlebit2 after dense"]
    assert results["littlebit2 after theirs"]
    for name in ("ours", "theirs"):
        assert results[name] == tokens(littlebit2.load(checkpoints / name))
    assert results["ours"] != results["dense"]
    assert re.match(r"CheckpointError: .*bits", results["odd"])


def test_broken_package_fails_loudly(installed: Environment, checkpoints: Path, tmp_path: Path) -> None:
    """Packed checkpoints are refused with the reason, dense ones load, and interpreters start."""
    broken = tmp_path / "broken"
    (broken / "littlebit2").mkdir(parents=True)
    (broken / "littlebit2/__init__.py").write_text("raise OSError('disk on fire')")
    names = ("dense", "ours", "said", "theirs", "odd")
    run = installed.run("-c", LOAD, *(checkpoints / name for name in names), PYTHONPATH=str(broken))
    results = json.loads(run.stdout)
    assert isinstance(results["dense"], list)
    for name in ("ours", "said", "theirs"):
        assert results[name].startswith(
            "ImportError: the checkpoint holds layers packed by littlebit2-kernels"
        )
        assert "OSError: disk on fire" in results[name]
    # Nothing says that these are packed, so that is a warning; transformers adds its own about random layers.
    assert f"whether {checkpoints / 'odd'} holds packed layers was not checked" in run.stderr


STATE = """
import sys
print(any(getattr(finder, "__name__", "") == "LittleBit2Autoregister" for finder in sys.meta_path))
"""


@pytest.mark.parametrize(
    ("options", "variables", "there"),
    [
        ((), {}, True),
        (("-I",), {}, True),
        (("-E",), {}, True),
        (("-S",), {}, False),
        ((), {"LB2_NO_AUTOREGISTER": "1"}, False),
        (("-I",), {"LB2_NO_AUTOREGISTER": "1"}, False),
        ((), {"LB2_NO_AUTOREGISTER": "0"}, True),
    ],
)
def test_where_the_hook_is(
    installed: Environment, options: tuple[str, ...], variables: dict[str, str], there: bool
) -> None:
    run = installed.run(*options, "-c", STATE, **variables)
    assert run.stdout.strip() == str(there)
    assert run.stderr == ""


def test_interpreters_start_without_the_hook_module(tmp_path: Path) -> None:
    """With half of the hook, Python starts, and transformers does not: it could leave layers random."""
    environment = make_environment(tmp_path / "environment", alone=True)
    (environment.packages / "transformers.py").touch()
    source = Path(__file__).resolve().parents[3] / "python" / HOOK[1]
    (environment.packages / HOOK[1]).write_bytes(source.read_bytes())
    run = environment.run("-c", "print('started')")
    assert (run.stdout, run.stderr) == ("started\n", "")
    run = environment.run("-c", "import transformers", check=False)
    assert "ModuleNotFoundError: No module named '_littlebit2_autoregister'" in run.stderr


@pytest.mark.parametrize("mode", ["wheel", "lenient", pytest.param("strict", marks=pytest.mark.slow)])
def test_installing_and_uninstalling(tmp_path: Path, sources: Path, mode: str) -> None:
    environment = make_environment(tmp_path / "environment")
    options = {
        "wheel": (),
        "lenient": ("--editable",),
        "strict": ("--config-settings", "editable_mode=strict", "--editable"),
    }[mode]
    install(environment, sources, *options)
    for name in HOOK:
        assert (environment.packages / name).is_file()
    code = "import _littlebit2_autoregister as hook, littlebit2; print(hook.__file__, littlebit2.__file__)"
    hook, package = environment.run("-c", code).stdout.split()
    assert Path(hook).parent == environment.packages
    home = environment.packages if mode == "wheel" else sources
    assert Path(package).is_relative_to(home)
    folder = "littlebit2_kernels/lib/cmake/littlebit2"
    assert (home / folder / "littlebit2-config.cmake").is_file()
    assert environment.run("-c", STATE).stdout.strip() == "True"
    environment.pip("uninstall", "--yes", "littlebit2-kernels")
    assert not [name for name in HOOK if (environment.packages / name).exists()]
    assert environment.run("-c", STATE).stderr == ""


@pytest.mark.slow
def test_reloading_the_registries() -> None:
    """What transformers registers anew after a reload finds our classes again."""
    code = """
import importlib, sys
sys.path.insert(0, sys.argv[1])
import _littlebit2_autoregister
_littlebit2_autoregister.install()
from transformers.quantizers import auto
first = auto.AUTO_QUANTIZER_MAPPING["littlebit2"]
assert first.is_stand_in
import littlebit2
littlebit2.register()
real = auto.AUTO_QUANTIZER_MAPPING["littlebit2"]
assert real.__module__ == "littlebit2.integrations.quantizer"
importlib.reload(auto)
assert auto.AUTO_QUANTIZER_MAPPING["littlebit2"].is_stand_in
config = auto.AutoQuantizationConfig.from_dict({"quant_method": "littlebit2"})
assert type(config).__module__ == "littlebit2.integrations.configuration", type(config)
assert auto.AUTO_QUANTIZER_MAPPING["littlebit2"] is real
from littlebit2.integrations.transformers import unregister
unregister()
assert auto.AUTO_QUANTIZER_MAPPING["littlebit2"].is_stand_in
assert type(auto.AutoHfQuantizer.from_config({"quant_method": "littlebit2"}, pre_quantized=True)) is real
print("done")
"""
    folder = Path(__file__).resolve().parents[3] / "python"
    run = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=False)
    assert run.stdout == "done\n", run.stderr
