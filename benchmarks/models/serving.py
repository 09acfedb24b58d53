"""Measure the throughput of vLLM on this machine's CPU: a packed Llama beside the dense one in bfloat16.

Both models have random weights; they are written to a folder first, which --folder keeps. Each is served in a
process of its own by the environment that `make test-serving` makes (--python). Decode is what a batch of
requests of 16 tokens gives in a second, the first token of each left out; prefill is one request of --prompt
tokens. The best of the repetitions counts.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.options import add_json, note, positive

__all__ = ["Throughput", "add_arguments", "model_config", "run", "table"]

_PYTHON = Path(".venv-serving", "bin", "python")

#: Serves the folder of its first argument by the settings of the second; prints figures as JSON, last.
_CHILD = """
import json, random, sys, time
from vllm import LLM, SamplingParams

how = json.loads(sys.argv[2])
llm = LLM(
    sys.argv[1],
    dtype="bfloat16",
    skip_tokenizer_init=True,
    enable_prefix_caching=False,
    max_model_len=how["prompt"] + how["tokens"] + 16,
    max_num_seqs=max(how["batches"]),
    seed=0,
)
draw = random.Random(0)

def seconds(requests, length, tokens):
    inputs = [
        {"prompt_token_ids": [draw.randrange(how["vocabulary"]) for _ in range(length)]}
        for _ in range(requests)
    ]
    sampling = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    start = time.perf_counter()
    llm.generate(inputs, sampling, use_tqdm=False)
    return time.perf_counter() - start

def best(*case):
    return min(seconds(*case) for _ in range(how["repetitions"] + 1))

tokens = how["tokens"]
decode = {}
for batch in how["batches"]:
    more = best(batch, 16, tokens) - best(batch, 16, 1)
    if more <= 0:
        sys.exit(f"batch {batch}: {tokens} tokens took no longer than one: the machine is too busy")
    decode[batch] = batch * (tokens - 1) / more
print(json.dumps({"decode": decode, "prefill": how["prompt"] / best(1, how["prompt"], 1)}))
"""


@dataclass(frozen=True)
class Throughput:
    """What one model gives, in tokens a second.

    Attributes:
        name: of the model.
        bytes: size of its weights on disk.
        decode: by batch size, all requests together.
        prefill: of one request.
    """

    name: str
    bytes: int
    decode: Mapping[str, float]
    prefill: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    for name, default in (
        ("hidden", 1024),
        ("intermediate", 2816),
        ("layers", 8),
        ("heads", 16),
        ("kv-heads", 4),
        ("vocabulary", 8192),
    ):
        parser.add_argument(f"--{name}", type=positive(int), default=default, help="default %(default)s")
    parser.add_argument(
        "--bpw", type=positive(float), nargs="+", default=[0.55], help="bits per weight (default %(default)s)"
    )
    parser.add_argument("--paths", type=positive(int), default=1, help="P (default %(default)s)")
    parser.add_argument(
        "--batches", type=positive(int), nargs="+", default=[1, 4, 16, 64], help="default %(default)s"
    )
    parser.add_argument(
        "--tokens", type=positive(int), default=64, help="tokens of a request (default %(default)s)"
    )
    parser.add_argument("--prompt", type=positive(int), default=512, help="default %(default)s")
    parser.add_argument("--repetitions", type=positive(int), default=3, help="default %(default)s")
    parser.add_argument("--threads", type=positive(int), default=1, help="default %(default)s")
    parser.add_argument(
        "--python", type=Path, default=_PYTHON, help="interpreter that has vLLM (default %(default)s)"
    )
    parser.add_argument("--folder", type=Path, metavar="DIR", help="where the models are written and kept")
    add_json(parser)


def run(options: Namespace) -> int:
    """Write the models, serve each and print the table."""
    from benchmarks.models.llama import require_transformers
    from benchmarks.records import describe_environment, environment, write_result

    if options.tokens < 2:
        raise ValueError(f"tokens must be at least 2, because the first is left out, got {options.tokens}")
    if not options.python.exists():
        raise RuntimeError(
            f"python must be an interpreter, got {options.python}: `make test-serving` makes it"
        )
    require_transformers()
    import torch

    about = environment(torch.device("cpu"), [options.threads])
    about["serving"] = _versions(options.python)
    found = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        for name, bpw in (("dense bfloat16", None), *((f"packed {bpw} bpw", bpw) for bpw in options.bpw)):
            path = folder / name.replace(" ", "-")
            if not path.exists():
                note(f"writing {path}")
                _write(options, path, bpw)
            note(f"serving {path}")
            found.append(_measure(options, name, path))
    print(describe_environment(about))
    print(f"served by {', '.join(f'{one} {version}' for one, version in about['serving'].items())}\n")
    print(table(found))
    if options.json is not None:
        path = write_result(options.json, options, about, throughput=found)
        note(f"wrote {path}")
    return 0


def table(found: list[Throughput]) -> str:
    """Return tokens a second as a markdown table."""
    from benchmarks.markdown import markdown

    batches = list(found[0].decode)
    head = ["model", "MiB", *(f"decode, batch {batch}" for batch in batches), "prefill"]
    lines = []
    for one in found:
        rates = (*one.decode.values(), one.prefill)
        lines.append([one.name, f"{one.bytes / 2**20:.0f}", *(f"{rate:.0f}" for rate in rates)])
    return markdown(head, lines)


def model_config(options: Namespace) -> dict[str, Any]:
    """Return the configuration of a Llama of the sizes that the options ask for."""
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": options.hidden,
        "intermediate_size": options.intermediate,
        "num_hidden_layers": options.layers,
        "num_attention_heads": options.heads,
        "num_key_value_heads": options.kv_heads,
        "vocab_size": options.vocabulary,
        "tie_word_embeddings": False,
        "max_position_embeddings": 4096,
        "bos_token_id": None,
        "eos_token_id": None,
    }


def _write(options: Namespace, path: Path, bpw: float | None) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import littlebit2

    config = model_config(options)
    if bpw is not None:
        littlebit2.synthesize(config, path, bpw, paths=options.paths)
        return
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(LlamaConfig(**config))
    model.to(torch.bfloat16).save_pretrained(path)


def _measure(options: Namespace, name: str, path: Path) -> Throughput:
    how = {key: getattr(options, key) for key in ("batches", "tokens", "prompt", "repetitions", "vocabulary")}
    done = subprocess.run(
        [str(options.python.absolute()), "-c", _CHILD, str(path.absolute()), json.dumps(how)],
        stdout=subprocess.PIPE,
        check=True,
        text=True,
        cwd=path,  # not the checkout, whose packages would shadow the installed ones
        env=_environment(options),
    )
    figures = json.loads(done.stdout.splitlines()[-1])
    return Throughput(name, sum(file.stat().st_size for file in path.glob("*.safetensors")), **figures)


def _environment(options: Namespace) -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return {
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        **own,
        "OMP_NUM_THREADS": str(options.threads),
        "HF_HUB_OFFLINE": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }


def _versions(python: Path) -> dict[str, str]:
    code = (
        "import json; from importlib.metadata import version; "
        "print(json.dumps({name: version(name) for name in ('vllm', 'torch', 'littlebit2-kernels')}))"
    )
    done = subprocess.run(
        [str(python.absolute()), "-c", code], stdout=subprocess.PIPE, check=True, text=True, cwd="/"
    )
    return dict(json.loads(done.stdout))
