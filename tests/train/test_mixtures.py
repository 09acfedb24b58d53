"""Fine-tuning of mixtures of experts, and of families whose files have other names than their modules."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn

import littlebit2
from littlebit2.architecture.experts import LittleBitExperts
from littlebit2.train.model import trainable_layers
from littlebit2.train.recipe import Recipe, finetune
from littlebit2.train.recipe.student import build_student
from littlebit2_kernels import LittleBitLinear
from tests.integrations.models.moe import QUANT
from tests.train.builders import write_mixture, write_text

RECIPE = Recipe(block=32, steps=2, batch_size=2, lr=2e-3, hold_out=0.1, quiet=True, tensorboard=False)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_experts_are_trained_and_written_packed(name: str, tmp_path: Path) -> None:
    teacher, data = write_mixture(name, tmp_path / "teacher"), write_text(tmp_path / "text.txt", 3000)
    report = finetune(teacher, tmp_path / "out", data, QUANT, recipe=RECIPE)
    assert report.agreement is not None
    assert report.agreement < 1e-4
    packed = littlebit2.load(tmp_path / "out")
    experts = [module for module in packed.modules() if isinstance(module, LittleBitExperts)]
    assert len(experts) == 2
    layers = [layer for module in experts for layer in module.expert(0).children()]
    assert all(isinstance(layer, LittleBitLinear) for layer in layers)


def test_a_start_gives_the_student_all_its_tensors(tmp_path: Path) -> None:
    teacher = write_mixture("mixtral", tmp_path / "teacher")
    start = tmp_path / "start"
    exclude = ["*lm_head*", "*.experts.1.*"]
    littlebit2.quantize_checkpoint(teacher, start, QUANT, exclude=exclude, progress=False)
    changed = littlebit2.load(start)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.data = parameter.data + 1
    changed.save_pretrained(tmp_path / "changed")
    student = build_student(teacher, tmp_path / "changed", dataclasses.replace(RECIPE, dense="all"))
    experts = student.model.layers[0].mlp.experts
    assert type(experts.expert(1).up_proj) is nn.Linear
    assert len(trainable_layers(student)) == 2 * (4 + 3 * 3)
    wanted = dict(changed.named_parameters())
    own = {id(p) for layer in trainable_layers(student).values() for p in layer.parameters()}
    dense = {name: p for name, p in student.named_parameters() if id(p) not in own}
    assert "model.layers.0.mlp.experts.1.up_proj.weight" in dense
    for name, parameter in dense.items():
        assert torch.equal(parameter, wanted[name]), name
