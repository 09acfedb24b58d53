"""``transformers serve`` and ``pipeline`` in an environment where the package is installed."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

import littlebit2
from littlebit2.integrations.transformers import attach
from tests.integrations.families import dense_model, quantized_copy
from tests.integrations.installed.environment import Environment, copy_sources, install, make_environment

PROMPT = "w5 w6 w7 w8"
#: What the server needs besides this project's packages (``pip install 'transformers[serving]'``).
NEEDED = ("fastapi", "openai", "uvicorn")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    environment = make_environment(tmp_path_factory.mktemp("served") / "environment")
    install(environment, copy_sources(tmp_path_factory.mktemp("sources") / "tree"))
    return environment


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "ours"
    model = quantized_copy(dense_model("llama"))
    attach(model)
    model.generation_config.eos_token_id = None
    model.save_pretrained(path)
    words = Tokenizer(WordLevel({f"w{token}": token for token in range(160)}, unk_token="w3"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0")
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> list[str]:
    model = littlebit2.load(checkpoint)
    ids = torch.tensor([[int(word[1:]) for word in PROMPT.split()]])
    found = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
    return [f"w{token}" for token in found.tolist()]


@pytest.mark.slow
def test_pipeline(installed: Environment, checkpoint: Path, expected: list[str]) -> None:
    code = """
import sys, transformers
generate = transformers.pipeline("text-generation", model=sys.argv[1], dtype="float32")
found = generate(sys.argv[2], max_new_tokens=8, do_sample=False, return_full_text=False)
print(found[0]["generated_text"])
"""
    assert installed.run("-c", code, checkpoint, PROMPT).stdout.split() == expected


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def server(installed: Environment, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server without a model; it loads the one that a request names."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}: pip install 'transformers[serving]'")
    log_file = tmp_path_factory.mktemp("server") / "log"
    port = free_port()
    command = ("-m", "transformers.cli.transformers", "serve", "--host", "127.0.0.1", "--port", str(port))
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "LB2_"))}
    with (
        log_file.open("w") as log,
        subprocess.Popen(
            [installed.python, *command, "--device", "cpu"], env=inherited, stdout=log, stderr=log
        ) as process,
    ):
        try:
            address = f"http://127.0.0.1:{port}"
            for _ in range(600):
                try:
                    urllib.request.urlopen(f"{address}/health", timeout=5)
                    break
                except OSError:
                    assert process.poll() is None, log_file.read_text()
                    time.sleep(0.2)
            yield address
        finally:
            process.terminate()


def ask(address: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(
        f"{address}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as reply:
        answer: dict[str, Any] = json.load(reply)
        return answer


@pytest.mark.slow
def test_serve_answers_with_the_packed_models_tokens(
    server: str, checkpoint: Path, expected: list[str]
) -> None:
    wanted = {"model": str(checkpoint), "max_tokens": 8, "temperature": 0}
    answer = ask(server, "/v1/completions", {**wanted, "prompt": PROMPT})
    assert answer["choices"][0]["text"].split() == expected
    messages = [{"role": "user", "content": PROMPT}]
    answer = ask(server, "/v1/chat/completions", {**wanted, "messages": messages})
    assert answer["choices"][0]["message"]["content"].split() == expected


@pytest.mark.slow
def test_serve_refuses_a_damaged_checkpoint(server: str, checkpoint: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in checkpoint.iterdir():
        (damaged / file.name).write_bytes(file.read_bytes())
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes().replace(b"U_packed", b"U_parked", 1))
    with pytest.raises(urllib.error.HTTPError) as refused:
        ask(server, "/v1/completions", {"model": str(damaged), "prompt": PROMPT, "max_tokens": 2})
    assert refused.value.code >= 400
