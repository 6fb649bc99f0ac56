"""What the startup probe takes for an answer."""

import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from tests.serving.configs import config_document

from trimtab_serving import probe


class Server(HTTPServer):
    """Answers every POST with `status` and `answer`; keeps the last request."""

    status = 200
    answer = b""
    request_body: Any = None
    authorization: str | None = None


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        self.server.request_body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.authorization = self.headers["Authorization"]
        self.send_response(self.server.status)
        self.end_headers()
        self.wfile.write(self.server.answer)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("TRIMTAB_LISTEN_ADDRESS", "127.0.0.1")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def completion(log_probability: float = -1.5, model: str = "assistant") -> bytes:
    """A completion of one token, as vLLM words it."""
    choice = {"text": "a", "finish_reason": "length", "logprobs": {"token_logprobs": [log_probability]}}
    return json.dumps({"model": model, "choices": [choice], "usage": {"completion_tokens": 1}}).encode()


def run(tmp_path: Path, port: int) -> int:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config_document(port=port)))
    return probe.main([str(path)])


def test_a_completion_of_one_token_is_ready(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    server.answer = completion()
    assert run(tmp_path, server.server_port) == 0
    assert server.request_body["model"] == "assistant"
    assert server.request_body["max_tokens"] == 1
    assert server.authorization == "Bearer secret"


@pytest.mark.parametrize(
    ("status", "answer", "said"),
    [
        (200, completion(float("nan")), "the weights give no numbers"),
        (200, completion(model="another"), "answers as 'another'"),
        (200, b'{"choices": []}', "no completion"),
        (200, b"<html>", "no answer yet"),
        (503, completion(), "503"),
    ],
)
def test_anything_else_is_not(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str], status: int, answer: bytes, said: str
) -> None:
    server.status, server.answer = status, answer
    assert run(tmp_path, server.server_port) == 1
    assert said in capsys.readouterr().err


def test_no_server_is_not_ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIMTAB_LISTEN_ADDRESS", "127.0.0.1")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        assert run(tmp_path, free.getsockname()[1]) == 1


@pytest.mark.parametrize(
    ("address", "host"),
    [("0.0.0.0", "127.0.0.1"), ("::", "[::1]"), ("127.3.2.1", "127.3.2.1"), ("fd00::7", "[fd00::7]")],
)
def test_the_server_is_reached_where_it_listens(address: str, host: str) -> None:
    assert probe.completions_url(address, 8000) == f"http://{host}:8000/v1/completions"
