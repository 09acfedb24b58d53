"""Checks of ``vllm serve``: answers and streams over HTTP, many clients of whom some leave in the middle."""

from __future__ import annotations

import random
import re
import socket
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

from http_client import Client
from steps import Steps, environment, stop

__all__ = ["check_server"]

#: Clients at a time, and seconds that they go on.
_CLIENTS = 32
_SECONDS = 120.0


def check_server(steps: Steps, model: Path, prompts: list[list[int]], expected: list[list[int]]) -> None:
    """Serve a model on the loopback interface and compare what clients get with ``expected``."""
    port = _free_port()
    log = steps.work / "serve.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [
                *("vllm", "serve", str(model), "--served-model-name", "packed", "--dtype", "float32"),
                *("--host", "127.0.0.1", "--port", str(port), "--max-model-len", "512"),
                *("--max-num-seqs", "16"),
            ],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment(steps.work),
            cwd=steps.work,
            start_new_session=True,
        )
    client = Client(port, "packed")
    pairs = list(zip(prompts, expected, strict=True))
    try:
        with steps.step("serve: starts"):
            _wait(process, client, log, min(steps.left, 240))
        with steps.step("serve: /v1/completions"):
            got = [client.complete(prompt, len(tokens)) for prompt, tokens in pairs]
            assert got == expected, f"expected {expected}, got {got}"
        with steps.step("serve: streams"):
            got = [client.stream(prompt, len(tokens)) for prompt, tokens in pairs]
            assert got == expected, f"expected {expected}, got {got}"
        with steps.step(f"serve: {_CLIENTS} clients, some of whom leave"):
            _many(steps, client, prompts, expected)
        with steps.step("serve: nothing is left of those who left"):
            _quiet(client)
            assert client.complete(prompts[0], len(expected[0])) == expected[0]
    finally:
        stop(process)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait(process: subprocess.Popen[Any], client: Client, log: Path, seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if process.poll() is not None:
            break
        try:
            client.get("/health")
        except (OSError, RuntimeError):
            time.sleep(0.5)
        else:
            return
    lines = "\n".join(log.read_text().splitlines()[-30:])
    raise RuntimeError(f"the server did not start:\n{lines}")


def _many(steps: Steps, client: Client, prompts: list[list[int]], expected: list[list[int]]) -> None:
    end = time.monotonic() + min(_SECONDS, max(5.0, steps.left - 60))
    wrong: list[str] = []
    whole = cut = 0
    lock = threading.Lock()

    def visit(seed: int) -> None:
        nonlocal whole, cut
        draw = random.Random(seed)
        while time.monotonic() < end and not wrong:
            index = draw.randrange(len(prompts))
            tokens = expected[index]
            leaves = draw.randrange(1, len(tokens)) if draw.random() < 0.3 else None
            try:
                got = client.stream(prompts[index], len(tokens), leaves)
            except Exception as error:  # of any kind, it is the check's failure
                wrong.append(f"{type(error).__name__}: {error}")
                return
            if got != (tokens if leaves is None else tokens[: len(got)]) or (leaves and not got):
                wrong.append(f"prompt {index}: expected {tokens}, got {got}")
            with lock:
                whole += leaves is None
                cut += leaves is not None

    threads = [threading.Thread(target=visit, args=(seed,)) for seed in range(_CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(f"        {whole} whole answers, {cut} that were cut", flush=True)
    assert not wrong, wrong[0]
    assert whole >= _CLIENTS, f"expected at least {_CLIENTS} whole answers, got {whole}"
    assert cut, "no client left"


def _quiet(client: Client) -> None:
    """Wait until no request runs or waits, and the cache of keys and values is empty."""
    names = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
    found: dict[str, float] = {}
    for _ in range(60):
        metrics = client.get("/metrics")
        found = {
            name: sum(
                map(float, re.findall(rf"^{re.escape(name)}\{{[^}}]*\}} (\S+)$", metrics, re.MULTILINE))
            )
            for name in names
            if f"\n{name}{{" in metrics
        }
        assert len(found) == len(names), f"metrics lack one of {names}"
        if not any(found.values()):
            return
        time.sleep(0.5)
    raise AssertionError(f"expected an idle server, got {found}")
