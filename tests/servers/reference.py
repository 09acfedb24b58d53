"""Tokens of ``littlebit2.load`` and ``generate``, as JSON. Run by ``check.py`` in a process of its own."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

import littlebit2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("jobs", type=Path, help="JSON: model, prompts, tokens, out and adapter of each")
    for job in json.loads(parser.parse_args().jobs.read_text()):
        model = littlebit2.load(job["model"], dtype=torch.float32)
        if getattr(model.config, "attn_logit_softcapping", None):
            # The default attention of transformers leaves the soft cap out.
            model.set_attn_implementation("eager")
        if job.get("adapter"):
            add_adapter(model, Path(job["adapter"]))
        tokens = []
        for prompt in job["prompts"]:
            ids = torch.tensor([prompt])
            count = job["tokens"]
            new = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=count,
                min_new_tokens=count,
                eos_token_id=None,
            )
            tokens.append(new[0, len(prompt) :].tolist())
        Path(job["out"]).write_text(json.dumps({"tokens": tokens}))


def add_adapter(model: torch.nn.Module, path: Path) -> None:
    """Add what a LoRA adapter adds to the outputs of linear layers."""
    config = json.loads((path / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / config["r"]
    tensors = load_file(path / "adapter_model.safetensors")
    first, second = ".lora_A.weight", ".lora_B.weight"
    for key in tensors:
        if key.endswith(first):
            name = key.removeprefix("base_model.model.").removesuffix(first)
            a, b = tensors[key], tensors[key.removesuffix(first) + second]

            def added(
                module: Any, inputs: Any, y: torch.Tensor, a: torch.Tensor = a, b: torch.Tensor = b
            ) -> torch.Tensor:
                return y + scale * (inputs[0] @ a.T @ b.T)

            model.get_submodule(name).register_forward_hook(added)


if __name__ == "__main__":
    main()
