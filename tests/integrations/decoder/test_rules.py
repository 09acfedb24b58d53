"""What must not change when decoder layers are fused, and when the modules' own computation has to run."""

from __future__ import annotations

import copy
import io
import json
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from torch._dynamo.testing import CompileCounter

import littlebit2
from littlebit2.architecture.decoder import fuse_modules, unfuse_modules
from littlebit2.integrations.peft import with_packed_layers
from littlebit2.integrations.transformers import attach
from littlebit2_kernels import LittleBitLinear
from tests.integrations.decoder.calls import Calls
from tests.integrations.families import dense_model, outputs, quantized_copy, relative_error, token_ids

#: Calls of a Llama of two layers.
WHOLE = (4, 2)


@pytest.fixture
def pair(llama: Any) -> tuple[Any, Any]:
    """The same model not fused, and fused."""
    fused = copy.deepcopy(llama)
    fuse_modules(fused)
    return copy.deepcopy(llama), fused


def _count(calls: Calls, model: Any) -> tuple[int, int]:
    calls.clear()
    outputs(model, token_ids(length=3))
    return calls.grouped, calls.mlps


def _same(got: torch.Tensor, wanted: torch.Tensor) -> bool:
    return got.dtype == wanted.dtype and relative_error(got, wanted) < 2e-5


# --- what a model is besides its outputs ---------------------------------------------------------------


def test_class_and_text(pair: tuple[Any, Any]) -> None:
    own, fused = pair
    assert str(fused) == str(own)
    for one, other in zip(own.modules(), fused.modules(), strict=True):
        assert isinstance(other, type(one))
        assert type(other).__name__ == type(one).__name__
    fused.model.layers[0].mlp.littlebit2_note = 1  # an attribute like any other
    unfuse_modules(fused)
    assert [type(module) for module in fused.modules()] == [type(module) for module in own.modules()]


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_whole_and_not_fused(pair: tuple[Any, Any], way: str, calls: Calls) -> None:
    own, fused = pair
    if way == "deepcopy":
        other = copy.deepcopy(fused)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(fused))
    else:
        file = io.BytesIO()
        torch.save(fused, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert [type(module) for module in other.modules()] == [type(module) for module in own.modules()]
    assert _count(calls, other) == (0, 0)
    ids = token_ids()
    assert _same(outputs(other, ids), outputs(own, ids))
    assert fuse_modules(other)
    outputs(other, ids)  # what comes from a file prepacks
    assert _count(calls, other) == WHOLE


def test_state_and_files(pair: tuple[Any, Any], tmp_path: Path) -> None:
    own, fused = pair
    state = fused.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in own.state_dict().items())
    fused.load_state_dict(state)
    for name, model in (("own", own), ("fused", fused)):
        attach(model)
        model.save_pretrained(tmp_path / name)
    files = [load_file(tmp_path / name / "model.safetensors") for name in ("own", "fused")]
    assert list(files[0]) == list(files[1])
    assert all(torch.equal(tensor, files[1][name]) for name, tensor in files[0].items())
    config = (tmp_path / "own" / "config.json").read_text()
    assert config == (tmp_path / "fused" / "config.json").read_text()
    assert "fuse" not in json.loads(config)["quantization_config"]


@pytest.mark.parametrize("way", ["load", "from_pretrained"])
def test_loading_fuses(llama: Any, tmp_path: Path, way: str, calls: Calls) -> None:
    model = copy.deepcopy(llama)
    attach(model)
    model.save_pretrained(tmp_path)
    if way == "load":
        loaded = littlebit2.load(tmp_path)
        assert _count(calls, littlebit2.load(tmp_path, fuse=False)) == (0, 0)
    else:
        littlebit2.register()
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    outputs(loaded, token_ids())
    assert _count(calls, loaded) == WHOLE
    assert _same(outputs(loaded, token_ids()), outputs(llama, token_ids()))


# --- when the own computation runs -----------------------------------------------------------------------


def _hook_each(model: Any, seen: list[str]) -> dict[str, Any]:
    layer = model.model.layers[0]
    names = ["mlp", "mlp.gate_proj", "mlp.down_proj", "mlp.act_fn", "input_layernorm", "self_attn"]
    names += ["self_attn.k_proj", "self_attn.o_proj", "post_attention_layernorm"]
    return {name: (layer.get_submodule(name), lambda *_, name=name: seen.append(name)) for name in names}


@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_run_and_see_what_they_did(pair: tuple[Any, Any], kind: str, calls: Calls) -> None:
    own, fused = pair
    ids = token_ids()
    wanted = outputs(own, ids)
    seen: list[str] = []
    for name, (module, hook) in _hook_each(fused, seen).items():
        seen.clear()
        handle = getattr(module, kind)(hook)
        assert _same(outputs(fused, ids), wanted)
        assert seen == [name]
        handle.remove()
        assert _count(calls, fused) == WHOLE
        assert seen == [name]
    values: dict[str, list[torch.Tensor]] = {"own": [], "fused": []}
    for name, model in (("own", own), ("fused", fused)):
        for module in (model.model.layers[1].mlp.down_proj, model.model.layers[1].self_attn):
            module.register_forward_hook(
                lambda _, inputs, kwargs, output, name=name: values[name].append(
                    (*inputs, *kwargs.values())[0]
                ),
                with_kwargs=True,
            )
        outputs(model, ids)
    assert all(_same(a, b) for a, b in zip(values["fused"], values["own"], strict=True))


def test_global_hooks(pair: tuple[Any, Any]) -> None:
    own, fused = pair
    seen: list[type] = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module)))
    try:
        outputs(own, token_ids())
        wanted = [kind.__name__ for kind in seen]
        seen.clear()
        outputs(fused, token_ids())
        assert sorted(kind.__name__ for kind in seen) == sorted(wanted)
    finally:
        handle.remove()


def test_outputs_that_the_library_records(pair: tuple[Any, Any]) -> None:
    with torch.no_grad():
        a, b = (model(token_ids(), output_hidden_states=True) for model in pair)
    assert len(a.hidden_states) == 3
    assert all(_same(x, y) for x, y in zip(b.hidden_states, a.hidden_states, strict=True))


def _replaced_layer(layer: Any) -> None:
    torch.manual_seed(1)
    layer.mlp.up_proj = nn.Linear(64, 96, bias=False)


def _replaced_directly(layer: Any) -> None:
    torch.manual_seed(1)
    layer.self_attn.add_module("k_proj", nn.Linear(64, 32, bias=False))


def _replaced_activation(layer: Any) -> None:
    layer.mlp.act_fn = nn.ReLU()


def _replaced_norm(layer: Any) -> None:
    layer.input_layernorm = nn.LayerNorm(64)


def _other_epsilon(layer: Any) -> None:
    layer.input_layernorm.variance_epsilon = 0.3


def _other_mode(layer: Any) -> None:
    layer.mlp.down_proj.activation = "exact"


def _other_backend(layer: Any) -> None:
    layer.mlp.gate_proj.backend = "reference"


def _patched_forward(layer: Any) -> None:
    down = layer.mlp.down_proj
    forward = down.forward
    down.forward = lambda x: 2 * forward(x)


def _whole_mlp(layer: Any) -> None:
    layer.mlp = nn.Identity()


def _unpacked(layer: Any) -> None:
    layer.mlp.up_proj.auto_prepack = False
    layer.mlp.up_proj.unpack_()


@pytest.mark.parametrize(
    ("change", "counts"),
    [
        (_replaced_layer, (4, 1)),
        (_replaced_directly, (3, 2)),
        (_replaced_activation, (4, 1)),
        (_replaced_norm, (3, 2)),
        (_other_epsilon, WHOLE),
        (_other_mode, (4, 1)),
        (_other_backend, (4, 1)),
        (_patched_forward, (4, 1)),
        (_whole_mlp, (4, 1)),
        (_unpacked, (4, 1)),
    ],
)
def test_changes_after_fusing(
    pair: tuple[Any, Any], change: Callable[[Any], None], counts: tuple[int, int], calls: Calls
) -> None:
    own, fused = pair
    for model in pair:
        change(model.model.layers[0])
    ids = token_ids(5)
    assert _same(outputs(fused, ids), outputs(own, ids))
    assert _count(calls, fused) == counts


def test_adapters(pair: tuple[Any, Any], calls: Calls) -> None:
    own, fused = pair
    config = with_packed_layers(
        peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    )
    models = []
    for model in (own, fused):
        torch.manual_seed(2)
        models.append(peft.get_peft_model(model, config).eval())
    ids = token_ids()
    before = outputs(own, ids)
    assert _same(outputs(models[1], ids), before)
    assert _count(calls, fused) == (2, 0)  # the output layers of both attentions
    with models[1].disable_adapter():
        assert not _same(outputs(models[1], ids), before)
    fused = models[1].unload()
    assert _count(calls, fused) == WHOLE


def test_training_gives_the_own_gradients(pair: tuple[Any, Any], calls: Calls) -> None:
    ids = token_ids()
    grads = []
    for model in pair:
        model.train()
        embedding = model.get_input_embeddings().weight
        model(ids, labels=ids).loss.backward()
        grads.append([embedding.grad, model.model.layers[0].input_layernorm.weight.grad])
    assert (calls.grouped, calls.mlps) == (0, 0)
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_checkpointed_training(pair: tuple[Any, Any]) -> None:
    ids = token_ids()
    grads = []
    for model in pair:
        model.train()
        model.gradient_checkpointing_enable()
        model(ids, labels=ids, use_cache=False).loss.backward()
        grads.append(model.get_input_embeddings().weight.grad)
    assert torch.equal(*grads)


def test_frozen_parameters_with_gradients_on(pair: tuple[Any, Any], calls: Calls) -> None:
    own, fused = pair
    for model in pair:
        model.requires_grad_(False)
    assert _same(fused(token_ids()).logits, own(token_ids()).logits)
    assert (calls.grouped, calls.mlps) == WHOLE


def test_autocast(pair: tuple[Any, Any], calls: Calls) -> None:
    ids = token_ids()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        own, fused = (model(ids).logits for model in pair)
    assert torch.equal(own, fused)
    assert (calls.grouped, calls.mlps) == (0, 0)


def test_norms_in_float32_of_a_model_in_16_bits(
    pair: tuple[Any, Any], rng: torch.Generator, calls: Calls
) -> None:
    """Such a norm gives float32: the layers after it have another dtype than the residual."""
    results = []
    x = torch.randn(1, 3, 64, generator=rng).to(torch.bfloat16)
    for model in pair:
        model.to(torch.bfloat16)
        places = model.model.rotary_emb(x, torch.arange(3)[None])
        for layer in model.model.layers:
            layer.input_layernorm.float()
        calls.clear()
        with torch.no_grad():
            results.append(model.model.layers[0](x, position_embeddings=places)[0])
    own, fused = results
    assert own.dtype == fused.dtype == torch.float32
    assert relative_error(fused, own) < 0.02
    assert (calls.grouped, calls.norms) == (1, 0)


def test_meta_device(llama: Any) -> None:
    model = copy.deepcopy(llama)
    fuse_modules(model)
    model.to("meta")
    with torch.no_grad():
        assert model(token_ids().to("meta")).logits.shape == (1, 12, 160)


class _Tagged(torch.Tensor):
    """A subclass that changes nothing."""


def test_subclasses_of_tensors(pair: tuple[Any, Any], calls: Calls) -> None:
    with torch.no_grad():
        x = pair[0].get_input_embeddings()(token_ids()).as_subclass(_Tagged)
        a, b = (model.model.layers[0].mlp(x) for model in pair)
    assert type(a) is type(b) is _Tagged
    assert torch.equal(a, b)
    assert calls.mlps == 0


@pytest.mark.parametrize(("family", "attribute"), [("phi3", "resid_mlp_dropout"), ("opt", "dropout")])
def test_dropout_before_a_sum_is_the_own(family: str, attribute: str, calls: Calls) -> None:
    model = quantized_copy(dense_model(family))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
        elif hasattr(module, attribute):
            module.dropout = 0.5
    model.train().requires_grad_(False)
    results = []
    for fuse in (unfuse_modules, fuse_modules):
        fuse(model)
        model(token_ids())
        calls.clear()
        torch.manual_seed(3)
        results.append(model(token_ids()).logits)
    assert relative_error(*results) < 2e-5
    assert calls.residuals == 0
    model.eval()
    model(token_ids())
    assert calls.residuals == 4


def test_threads(pair: tuple[Any, Any]) -> None:
    """A fused model has no state of a call: threads do not meet. Layers change their layout meanwhile."""
    own, fused = pair
    inputs = [token_ids(length) for length in (3, 5, 8)]
    wanted = [outputs(own, ids) for ids in inputs]
    right: list[bool] = []

    def work(index: int) -> None:
        right.extend(_same(outputs(fused, inputs[index]), wanted[index]) for _ in range(6))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for layer in fused.modules():
        if isinstance(layer, LittleBitLinear):
            layer.unpack_()
    for thread in threads:
        thread.join()
    assert right == [True] * 18


# --- compilers -------------------------------------------------------------------------------------------


def test_compiled_without_breaks_or_more_graphs(pair: tuple[Any, Any]) -> None:
    frames, logits = [], []
    for model in pair:
        torch._dynamo.reset()
        counter = CompileCounter()
        compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=False)
        cache = transformers.StaticCache(config=model.config, max_cache_len=16)
        with torch.no_grad():
            steps = [compiled(torch.tensor([[7 + i]]), past_key_values=cache).logits for i in range(4)]
        frames.append(counter.frame_count)
        logits.append(torch.cat(steps))
    assert _same(logits[1], logits[0])
    assert frames[1] == frames[0]


def test_compiled_with_a_hook(pair: tuple[Any, Any]) -> None:
    own, fused = pair
    for model in pair:
        model.model.layers[0].mlp.up_proj.register_forward_hook(lambda _, __, y: 2 * y)
    torch._dynamo.reset()
    compiled = torch.compile(fused, backend="eager", fullgraph=True)
    with torch.no_grad():
        logits = compiled(token_ids(), use_cache=False).logits
    assert _same(logits, outputs(own, token_ids()))


@pytest.mark.parametrize("strict", [False, True])
def test_exported(pair: tuple[Any, Any], strict: bool) -> None:
    own, fused = pair
    with torch.no_grad():
        x = own.get_input_embeddings()(token_ids())
        mlp = fused.model.layers[0].mlp
        exported = torch.export.export(mlp, (x,), strict=strict)
        assert _same(exported.module()(x), own.model.layers[0].mlp(x))
