"""A client of the OpenAI API over plain sockets: whole answers, streams, and streams that are cut."""

from __future__ import annotations

import http.client
import json
from typing import Any

__all__ = ["Client"]


class Client:
    """Asks a server on this machine.

    Args:
        port: of the server, on 127.0.0.1.
        model: its name there.
    """

    def __init__(self, port: int, model: str) -> None:
        self.port = port
        self.model = model

    def get(self, path: str) -> str:
        """The body of a GET.

        Raises:
            RuntimeError: the status is not 200.
        """
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            body = answer.read().decode()
        finally:
            connection.close()
        if answer.status != 200:
            raise RuntimeError(f"GET {path}: status {answer.status}: {body:.300}")
        return body

    def complete(self, prompt: list[int], tokens: int) -> list[int]:
        """Greedy tokens after a prompt, in one answer."""
        connection, answer = self._post(prompt, tokens, stream=False)
        try:
            text = json.loads(answer.read())["choices"][0]["text"]
        finally:
            connection.close()
        return _ids(text)

    def stream(self, prompt: list[int], tokens: int, cut_after: int | None = None) -> list[int]:
        """The same as a stream of events; ``cut_after`` closes the connection after so many of them."""
        connection, answer = self._post(prompt, tokens, stream=True)
        text = ""
        events = 0
        try:
            while line := answer.readline():
                data = line.decode().strip().removeprefix("data: ")
                if data == "[DONE]":
                    break
                if data:
                    text += json.loads(data)["choices"][0]["text"]
                    events += 1
                    if events == cut_after:
                        break
        finally:
            connection.close()
        return _ids(text)

    def _post(self, prompt: list[int], tokens: int, *, stream: bool) -> Any:
        body = {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "skip_special_tokens": False,
            "stream": stream,
        }
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        if answer.status != 200:
            text = answer.read().decode()
            connection.close()
            raise RuntimeError(f"status {answer.status}: {text:.300}")
        return connection, answer


def _ids(text: str) -> list[int]:
    """Token ids of words ``t0``, ``t1``, ..."""
    return [int(word.removeprefix("t")) for word in text.split()]
