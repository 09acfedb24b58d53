"""Count the launches of one Llama decoder layer in a decode step on CUDA, by part. Nothing is measured.

Launches of packed layers are those of plans. Of all else, torch's operators are counted while a tiny Llama
of transformers decodes one bfloat16 token on the CPU, views left out: on a GPU, each of them is a kernel.
"""

from __future__ import annotations

import argparse
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

from benchmarks.markdown import markdown

__all__ = ["PARTS", "add_arguments", "count_operators", "launches", "packed_launches", "run"]

#: Parts of a layer beside its linear layers, and whether fused calls have them in the launches of these.
PARTS = {
    "norms": True,
    "activation and product": True,
    "residual sums": True,
    "rotary embedding": False,
    "cache and attention": False,
}

_VIEWS = {
    *("view", "_unsafe_view", "t", "transpose", "unsqueeze", "slice", "expand", "select", "alias", "detach"),
    "scalar_tensor",  # numbers of the CPU's attention
}
#: Calls of packed layers by how they are made.
_CALLS = {
    "apart": (("q",), ("k",), ("v",), ("o",), ("gate",), ("up",), ("down",)),
    "grouped": (("q", "k", "v"), ("o",), ("gate", "up"), ("down",)),
}


def packed_launches(how: str, tokens: int, gpu: str) -> int:
    """Launches of the packed layers of Llama-2-7B's decoder layer at 0.1 bpw, from plans.

    Args:
        how: ``"apart"``, or ``"grouped"`` by the input that they share.
        tokens: M, at most 16.
        gpu: a name of :data:`littlebit2_kernels.gpu.GPUS`.
    """
    import torch

    from littlebit2.quantize import rank_for_bpw
    from littlebit2_kernels.dispatch import ACTIVATIONS
    from littlebit2_kernels.format import LayerShape
    from littlebit2_kernels.gpu import gpu_properties
    from littlebit2_kernels.planning.native import plan_grouped_cuda

    sizes = {"gate": (4096, 11008), "up": (4096, 11008), "down": (11008, 4096)}
    total = 0
    for names in _CALLS[how]:
        shapes = []
        for name in names:
            k, n = sizes.get(name, (4096, 4096))
            shapes.append(LayerShape(k, n, (rank_for_bpw(k, n, 0.1, paths=2),) * 2))
        plan = plan_grouped_cuda(shapes, tokens, torch.bfloat16, ACTIVATIONS["auto"], gpu_properties(gpu))
        total += len(plan["launches"])
    return total


def count_operators() -> dict[str, int]:
    """Torch's operators in one decode step of a decoder layer, by part."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, vocab_size=64
    )
    model = LlamaForCausalLM(config).bfloat16().eval()
    inside: list[str] = []
    counts = dict.fromkeys(PARTS, 0)
    attending = False

    class Counter(TorchDispatchMode):
        def __torch_dispatch__(
            self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
        ) -> Any:
            nonlocal attending
            name = function.name().removeprefix("aten::").partition(".")[0]
            path = inside[-1] if inside else ""
            if path.startswith("model.layers.0") and name not in _VIEWS and not path.endswith("_proj"):
                attending = attending or name in ("arange", "index_copy_") or "attention" in name
                if path.endswith("layernorm"):
                    counts["norms"] += 1
                elif ".mlp" in path:
                    counts["activation and product"] += 1
                elif path.endswith("self_attn"):
                    counts["cache and attention" if attending else "rotary embedding"] += 1
                else:
                    counts["residual sums"] += 1
            return function(*args, **(kwargs or {}))

    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda *_, name=name: inside.append(name))
        module.register_forward_hook(lambda *_: (inside.pop(), None)[1])
    cache = StaticCache(config=config, max_cache_len=16)
    with torch.no_grad():
        model(torch.tensor([[1, 2]]), past_key_values=cache, use_cache=True)
        with Counter():
            model(torch.tensor([[3]]), past_key_values=cache, use_cache=True)
    return counts


def launches(tokens: int, gpu: str) -> dict[str, dict[str, int]]:
    """Launches by part, of calls apart, grouped, and fused with what surrounds them."""
    operators = count_operators()
    apart, grouped = (packed_launches(how, tokens, gpu) for how in ("apart", "grouped"))
    table = {"packed layers": {"apart": apart, "grouped": grouped, "fused": grouped}}
    for part, fuses in PARTS.items():
        count = operators[part]
        table[part] = {"apart": count, "grouped": count, "fused": 0 if fuses else count}
    table["all"] = {how: sum(row[how] for row in table.values()) for how in ("apart", "grouped", "fused")}
    return table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--tokens", type=int, default=1, help="1 to 16; default: 1")
    parser.add_argument("--gpu", default="H200", help="default: H200")


def run(options: Namespace) -> int:
    """Print the table."""
    if not 1 <= options.tokens <= 16:
        raise SystemExit(f"--tokens must be between 1 and 16, got {options.tokens}")
    table = launches(options.tokens, options.gpu)
    rows = [[part, *map(str, row.values())] for part, row in table.items()]
    print(markdown(["launches of a decoder layer", "apart", "grouped", "fused"], rows))
    return 0
