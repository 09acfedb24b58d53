"""One measurement of `overhead`, in a process of its own; prints JSON. Not a command: `overhead` runs it.

It runs on any checkout that PYTHONPATH names, so it uses only public API that stays, and nothing of
benchmarks.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

#: K = N and R of the tiny layer: two paths of one word and less.
FEATURES, RANKS = 64, (16, 16)
#: Turns of each call; the fastest counts, for only disturbances make a call slower.
TURNS = 7
#: Loads of the checkpoint after the first, which imports and compiles.
LOADS = 3

clock: Callable[[], float] = time.perf_counter


def calls(seconds: float) -> dict[str, float]:
    """Seconds of one call of a tiny layer, of functions and modules, beside torch's dense ones."""
    import torch

    from littlebit2_kernels import LittleBitLinear, littlebit_linear, prepack
    from littlebit2_kernels.testing import make_packed

    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    packed = make_packed(FEATURES, FEATURES, RANKS, generator=generator)
    prepacked = prepack(packed)
    module, ready = LittleBitLinear.from_packed(packed), LittleBitLinear.from_packed(packed).prepack_()
    linear = torch.nn.Linear(FEATURES, FEATURES, bias=False).requires_grad_(False)
    x = torch.randn(1, FEATURES, generator=generator)
    candidates: dict[str, Callable[[], object]] = {
        "littlebit_linear, packed": lambda: littlebit_linear(x, packed),
        "littlebit_linear, prepacked": lambda: littlebit_linear(x, prepacked),
        "LittleBitLinear": lambda: module(x),
        "LittleBitLinear, prepack_()": lambda: ready(x),
        "F.linear": lambda: torch.nn.functional.linear(x, linear.weight),
        "nn.Linear": lambda: linear(x),
    }
    found: dict[str, float] = {}
    with torch.inference_mode():
        counts = {name: max(1, int(seconds / TURNS / _turn(call, 100))) for name, call in candidates.items()}
        for _ in range(TURNS):
            for name, call in candidates.items():
                elapsed = _turn(call, counts[name])
                found[f"call: {name}"] = min(elapsed, found.get(f"call: {name}", elapsed))
    return found


def _turn(call: Callable[[], object], count: int) -> float:
    call()
    start = clock()
    for _ in range(count):
        call()
    return (clock() - start) / count


def imports(name: str) -> dict[str, float]:
    """Seconds of importing a module in this fresh process."""
    start = clock()
    __import__(name)
    return {f"import {name}": clock() - start}


def synthesize(folder: str) -> dict[str, float]:
    """Make a small checkpoint."""
    import littlebit2

    config = {
        "model_type": "llama",
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": 512,
    }
    littlebit2.synthesize(config, folder, 1.0)
    return {}


def load(folder: str) -> dict[str, float]:
    """Seconds of loading that checkpoint: the first time in a process, and later."""
    start = clock()
    import littlebit2

    littlebit2.load(folder)
    first = clock() - start
    times = []
    for _ in range(LOADS):
        start = clock()
        littlebit2.load(folder)
        times.append(clock() - start)
    return {"littlebit2.load, first, with imports": first, "littlebit2.load, later": min(times)}


def main(clock_name: str, kind: str, *arguments: str) -> None:
    """Run one measurement and print it."""
    global clock
    clock = {"elapsed": time.perf_counter, "cpu": time.process_time}[clock_name]
    seconds = {
        "calls": lambda: calls(float(arguments[0])),
        "import": lambda: imports(arguments[0]),
        "synthesize": lambda: synthesize(arguments[0]),
        "load": lambda: load(arguments[0]),
    }[kind]()
    import littlebit2_kernels

    root = Path(str(littlebit2_kernels.__file__)).parents[1]
    print(json.dumps({"root": str(root), "seconds": seconds}))


main(*sys.argv[1:])
