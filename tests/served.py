"""A server in this process, and clients of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import openai
import torch

from moe_tools.serving.app import Limits
from moe_tools.serving.serve import Settings, opened


class Running:
    """A server that runs."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.openai = self.client("none")

    def client(self, key: str) -> openai.OpenAI:
        """OpenAI's own client; it never tries again."""
        return openai.OpenAI(base_url=f"{self.address}/v1", api_key=key, max_retries=0, timeout=60)

    def completion(self, prompt: str, new: int = 8, **more: Any) -> str:
        """A greedy continuation."""
        said: dict[str, Any] = {"temperature": 0, "max_tokens": new, **more}
        done = self.openai.completions.create(model="tiny", prompt=prompt, **said)
        return str(done.choices[0].text)

    def connect(self) -> HTTPConnection:
        """A connection without a client's help."""
        return HTTPConnection(urlsplit(self.address).netloc, timeout=60)

    def call(
        self, method: str, path: str, body: Any = None, **headers: str
    ) -> tuple[int, dict[str, str], Any]:
        """Status, headers and JSON, or text, of an answer."""
        sent = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        connection = self.connect()
        try:
            connection.request(method, path, sent, headers)
            answer = connection.getresponse()
            text = answer.read().decode()
            found = {name.lower(): value for name, value in answer.getheaders()}
            is_json = found.get("content-type") == "application/json"
            return answer.status, found, json.loads(text) if is_json else text
        finally:
            connection.close()

    def metric(self, name: str) -> float:
        """One line of /metrics; 0 where it is not there."""
        lines = self.call("GET", "/metrics")[2].splitlines()
        return next((float(line.split()[-1]) for line in lines if line.startswith(f"{name} ")), 0.0)


@contextmanager
def running(folder: Path, limits: Limits | None = None, **settings: Any) -> Iterator[Running]:
    """Serves a folder while it lasts."""
    made = Settings(
        str(folder),
        torch.float32,
        name="tiny",
        port=0,
        limits=limits or Limits(),
        **{"grace": 5.0, "slots": 8} | settings,
    )
    with opened(made) as server:
        server.start()
        try:
            yield Running(server.address)
        finally:
            server.end()
            server.join()
