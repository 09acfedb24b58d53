"""Measure the memory that ``littlebit2.load`` takes for a mixture of experts, beside the size of its files.

The model has random signs and the sizes of Qwen3-30B-A3B: 48 layers, hidden size 2048, 128 experts of inner
size 768, a vocabulary of 151936. It is written to a folder first, which --folder keeps for the next time, and
loaded in a process of its own. Dense tensors are memory-mapped: they count once they are touched, and all of
them are. Needs transformers and Linux; downloads nothing.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.options import add_json, note, positive

__all__ = ["LoadMemory", "add_arguments", "measure", "run"]

#: Loads the folder of its argument; prints bytes and seconds as JSON.
_CHILD = """
import json, sys, time
import torch
from littlebit2.integrations.loading import load
from transformers.models.qwen3_moe import modeling_qwen3_moe

def memory(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))

with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak begins here
before = memory("VmRSS")
start, cpu = time.perf_counter(), time.process_time()
model = load(sys.argv[1])
seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
peak = memory("VmHWM")
for tensor in (*model.parameters(), *model.buffers()):
    tensor.detach().flatten().view(torch.uint8)[::1024].sum()
print(json.dumps({
    "before": before,
    "peak": peak,
    "touched": memory("VmHWM"),
    "seconds": seconds,
    "cpu_seconds": cpu_seconds,
}))
"""


@dataclass(frozen=True)
class LoadMemory:
    """What loading took; memory in bytes.

    Attributes:
        layers: packed layers.
        packed: bytes of their tensors in the files.
        files: bytes of all files of weights.
        before: resident before loading, everything imported.
        peak: most that was resident while loading.
        touched: most that was resident once every tensor was read.
        seconds: of loading.
        cpu_seconds: likewise, CPU time.
    """

    layers: int
    packed: int
    files: int
    before: int
    peak: int
    touched: int
    seconds: float
    cpu_seconds: float

    @property
    def ratio(self) -> float:
        """Memory that loading and reading everything takes, over the size of the files."""
        return (self.touched - self.before) / self.files


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--layers", type=positive(int), default=48, help="default %(default)s")
    parser.add_argument("--experts", type=positive(int), default=128, help="default %(default)s")
    parser.add_argument("--hidden", type=positive(int), default=2048, help="default %(default)s")
    parser.add_argument("--inner", type=positive(int), default=768, help="default %(default)s")
    parser.add_argument("--vocabulary", type=positive(int), default=151936, help="default %(default)s")
    parser.add_argument("--bpw", type=positive(float), default=0.1, help="default %(default)s")
    parser.add_argument("--paths", type=positive(int), default=1, help="P (default %(default)s)")
    parser.add_argument(
        "--folder", type=Path, metavar="DIR", help="where the model is, or is written and kept"
    )
    add_json(parser)


def run(options: Namespace) -> int:
    """Write the model where it has to be, load it and print what that took."""
    from benchmarks.models.llama import require_transformers
    from benchmarks.records import describe_environment, environment, write_result

    require_transformers()
    import torch

    about = environment(torch.device("cpu"), [torch.get_num_threads()])
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary, "model")
        if not folder.exists():
            _write(options, folder)
        found = measure(folder)
    print(describe_environment(about))
    print(f"\n{describe(found)}")
    if options.json is not None:
        path = write_result(options.json, options, about, load=found, ratio=found.ratio)
        print(f"\nwrote {path}", file=sys.stderr)
    return 0


def describe(found: LoadMemory) -> str:
    """Return the figures as lines of text."""
    size = 2**20
    return "\n".join(
        (
            f"{found.layers} packed layers, {found.packed / size:.0f} MiB; all weights on disk "
            f"{found.files / size:.0f} MiB",
            f"loaded in {found.seconds:.0f} s ({found.cpu_seconds:.0f} s of CPU time)",
            f"resident before {found.before / size:.0f} MiB; loading adds "
            f"{(found.peak - found.before) / size:.0f} MiB at its peak, "
            f"{(found.touched - found.before) / size:.0f} MiB once every tensor was read",
            f"{found.ratio:.2f} times the files",
        )
    )


def measure(folder: Path) -> LoadMemory:
    """Load a checkpoint in a process of its own.

    Raises:
        subprocess.CalledProcessError: it cannot be loaded; stderr says why.
    """
    from littlebit2.checkpoint import describe as describe_checkpoint
    from littlebit2.checkpoint import open_checkpoint

    done = subprocess.run([sys.executable, "-c", _CHILD, str(folder)], stdout=subprocess.PIPE, check=True)
    with open_checkpoint(folder) as checkpoint:
        totals = describe_checkpoint(checkpoint)["totals"]
    sizes = totals["bytes"]
    files = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    packed = sizes["packed"] + sizes["scales"] + sizes["bias"] + sizes["other"]
    return LoadMemory(totals["layers"], packed, files, **json.loads(done.stdout))


def _write(options: Namespace, folder: Path) -> None:
    import littlebit2

    start = time.perf_counter()
    note(f"writing {folder}")
    littlebit2.synthesize(model_config(options), folder, options.bpw, paths=options.paths)
    note(f"written in {time.perf_counter() - start:.0f} s")


def model_config(options: Namespace) -> dict[str, Any]:
    """Return the configuration of a Qwen3 mixture of the sizes that the options ask for."""
    return {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "hidden_size": options.hidden,
        "moe_intermediate_size": options.inner,
        "intermediate_size": 3 * options.hidden,
        "num_experts": options.experts,
        "num_experts_per_tok": min(8, options.experts),
        "num_hidden_layers": options.layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": options.hidden // 16,
        "vocab_size": options.vocabulary,
        "tie_word_embeddings": False,
        "max_position_embeddings": 40960,
    }
