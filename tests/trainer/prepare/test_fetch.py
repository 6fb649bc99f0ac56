"""Sources over the network, each against a real server on this machine: S3 (moto), the Hub's HTTP API, https."""

import hashlib
import http.server
import json
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import boto3
import pytest
import trustme
from moto.server import ThreadedMotoServer
from tests.trainer.prepare.kit import chats, opened, run, sft, write_jsonl

from trimtab_trainer.data.fetch import Source, fetch
from trimtab_trainer.errors import BadConfiguration, InputMissing, UnsafeInput
from trimtab_trainer.prepare.sources import wanted_data_file

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ROWS = "".join(json.dumps(row) + "\n" for row in chats(12)).encode()


def names(source: Source, scratch: Path, kind: Any = "dataset") -> dict[str, bytes]:
    return {file.name: file.path.read_bytes() for file in fetch(source, kind, wanted_data_file, scratch)}


@contextmanager
def serving(answer: Any, context: ssl.SSLContext | None = None) -> Iterator[int]:
    """An HTTP(S) server whose answer(handler) does the work; yields its port."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            answer(self)

        do_HEAD = do_GET  # noqa: N815  (http.server's name)

        def log_message(self, *_: object) -> None:
            pass

        def reply(self, status: int, body: bytes = b"", **headers: str) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    if context:
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    endpoint = "http://{}:{}".format(*server.get_host_and_port())
    client = boto3.client(
        "s3", endpoint_url=endpoint, region_name="us-east-1", aws_access_key_id="key", aws_secret_access_key="secret"
    )
    client.create_bucket(Bucket="data")
    for key in ("chat.jsonl", "many/a.jsonl", "many/sub/b.jsonl", "many/README.md", "manyother/c.jsonl"):
        client.put_object(Bucket="data", Key=key, Body=ROWS)
    yield endpoint
    server.stop()


def _secret(folder: Path, **keys: str) -> Path:
    folder.mkdir()
    for name, value in keys.items():
        (folder / name).write_text(f"{value}\n")
    return folder


@pytest.fixture
def keys(s3: str, tmp_path: Path) -> Path:
    return _secret(
        tmp_path / "secret",
        AWS_ACCESS_KEY_ID="key",
        AWS_SECRET_ACCESS_KEY="secret",
        AWS_ENDPOINT_URL=s3,
        AWS_REGION="us-east-1",
        AZURE_STORAGE_ACCOUNT_KEY="of another store",
    )


def test_s3_object_and_prefix(keys: Path, tmp_path: Path) -> None:
    assert names(Source("s3://data/chat.jsonl", secret=keys), tmp_path / "1") == {"chat.jsonl": ROWS}
    found = names(Source("s3://data/many", secret=keys), tmp_path / "2")
    assert found == {"a.jsonl": ROWS, "sub/b.jsonl": ROWS}
    source = {"uri": "s3://data/chat.jsonl", "secretPath": str(keys)}
    report = run(tmp_path / "root", {**sft(), "data": [source]})
    assert report.stages[0].records == 12
    assert opened(tmp_path / "root", report).record_names([3]) == ["chat.jsonl:4"]


def test_s3_what_is_missing_is_named(keys: Path, tmp_path: Path) -> None:
    for uri in ("s3://data/none.jsonl", "s3://nobucket/x.jsonl"):
        with pytest.raises(InputMissing, match=f"{uri}: .*check"):
            fetch(Source(uri, secret=keys), "dataset", wanted_data_file, tmp_path / "1")


class Hub:
    """The part of the Hub's API that a download needs."""

    def __init__(self, files: dict[str, bytes], kind: str) -> None:
        self.files, self.kind, self.requests = files, kind, []  # type: ignore[var-annotated]

    def __call__(self, handler: Any) -> None:
        path = handler.path.split("?")[0]
        self.requests.append((handler.command, path, handler.headers.get("Authorization")))
        prefix = "/datasets" if self.kind == "dataset" else ""
        resolve = f"{prefix}/org/name/resolve/{COMMIT}/"
        if path == f"/api/{self.kind}s/org/name/revision/{COMMIT}":
            siblings = [{"rfilename": name} for name in self.files]
            body = json.dumps({"id": "org/name", "sha": COMMIT, "siblings": siblings}).encode()
            handler.reply(200, body, Content_Type="application/json")
        elif path.startswith(resolve) and path.removeprefix(resolve) in self.files:
            body = self.files[path.removeprefix(resolve)]
            etag = f'"{hashlib.sha256(body).hexdigest()}"'
            handler.reply(200, body, ETag=etag, X_Repo_Commit=COMMIT, Accept_Ranges="bytes")
        else:
            handler.reply(404, b"{}", X_Error_Code="RepoNotFound" if "other" in path else "EntryNotFound")


def test_hub_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(
        {"data/train-0.jsonl": ROWS, "data/test-0.jsonl": ROWS, "README.md": b"x", "extra/e.jsonl": ROWS}, "dataset"
    )
    secret = _secret(tmp_path / "secret", HF_TOKEN="hf_x")
    with serving(hub) as port:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
        assert names(Source("hf://org/name", COMMIT, secret), tmp_path / "1") == {"data/train-0.jsonl": ROWS}
        assert names(Source("hf://org/name/extra", COMMIT), tmp_path / "2") == {"e.jsonl": ROWS}
        assert names(Source("hf://org/name/data/test-0.jsonl", COMMIT), tmp_path / "3") == {"test-0.jsonl": ROWS}
        with pytest.raises(InputMissing, match="hf://org/other: no such dataset, or private; check the name"):
            names(Source("hf://org/other", COMMIT), tmp_path / "4")
        with pytest.raises(InputMissing, match="no usable file there"):
            names(Source("hf://org/name/nothing", COMMIT), tmp_path / "5")
    assert ("GET", "/datasets/org/name/resolve/" + COMMIT + "/data/train-0.jsonl", "Bearer hf_x") in hub.requests
    with pytest.raises(BadConfiguration, match="revision is 'main'; pin it to a commit of 40 hex digits"):
        names(Source("hf://org/name", "main"), tmp_path / "6")


def test_hub_out_of_reach_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(InputMissing, match=f"hf://org/name at {COMMIT}: .*check name, revision and network"):
        names(Source("hf://org/name", COMMIT), tmp_path / "1")


def test_hub_model_is_fetched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from trimtab_trainer.data.tokenizer import train_tokenizer
    from trimtab_trainer.settings import TokenizerTraining

    folder = tmp_path / "model"
    train_tokenizer(iter(["What is it? It is 1."] * 9), TokenizerTraining(vocabulary_size=300), folder)
    tiny = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=300, **tiny)).save_pretrained(folder)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    data = write_jsonl(tmp_path / "chat.jsonl", chats(5)).as_uri()
    model = {"uri": "hf://org/name", "revision": COMMIT}
    hub = Hub(files, "model")
    with serving(hub) as port:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
        report = run(tmp_path / "root", sft(data), model=model)
        asked = len(hub.requests)
        assert run(tmp_path / "root", sft(data), model=model).model == report.model
        assert len(hub.requests) == asked
    assert report.model is not None
    kept = tmp_path / "root" / "models" / report.model.digest[7:]
    assert (kept / "model.safetensors").read_bytes() == files["model.safetensors"]
    assert not list(kept.rglob("*.lock"))

    hub = Hub({**files, "pytorch_model.bin": b"pickle"}, "model")
    with serving(hub) as port:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
        with pytest.raises(UnsafeInput, match=r"pytorch_model\.bin: code and pickles are refused"):
            run(tmp_path / "other", sft(data), model=model)
    assert not [path for _, path, _ in hub.requests if "resolve" in path]


class Web:
    """A file server with a few ways to go wrong."""

    def __init__(self) -> None:
        self.failures = 2

    def __call__(self, handler: Any) -> None:
        path = handler.path
        if path == "/moved/chat.jsonl":
            handler.reply(302, Location="/chat.jsonl")
        elif path == "/plain/chat.jsonl":
            handler.reply(302, Location="http://localhost/chat.jsonl")
        elif path == "/inside/chat.jsonl":
            handler.reply(302, Location="https://169.254.169.254/chat.jsonl")
        elif path == "/loop/chat.jsonl":
            handler.reply(302, Location="/loop/chat.jsonl")
        elif path == "/busy/chat.jsonl" and self.failures:
            self.failures -= 1
            handler.reply(503)
        elif path == "/cut/chat.jsonl" and self.failures:
            self.failures -= 1
            handler.send_response(200)
            handler.send_header("Content-Length", str(len(ROWS)))
            handler.end_headers()
            handler.wfile.write(ROWS[:100])
            handler.close_connection = True
        elif path.split("?")[0].endswith("/chat.jsonl") and "none" not in path:
            handler.reply(200, ROWS)
        else:
            handler.reply(404)


@pytest.fixture
def web(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    with serving(Web(), context) as port:
        yield f"https://localhost:{port}"


@pytest.mark.parametrize("path", ["/chat.jsonl?key=1", "/moved/chat.jsonl", "/busy/chat.jsonl", "/cut/chat.jsonl"])
def test_https_delivers_the_whole_file(web: str, tmp_path: Path, path: str) -> None:
    assert names(Source(web + path), tmp_path / "x") == {"chat.jsonl": ROWS}


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/none/chat.jsonl", "the server answers 404 Not Found; check the uri"),
        ("/plain/chat.jsonl", "redirects to http://localhost; only https is followed"),
        ("/inside/chat.jsonl", r"redirects to the private address 169\.254\.169\.254"),
        ("/loop/chat.jsonl", "more than 5 redirects"),
    ],
)
def test_https_refuses(web: str, tmp_path: Path, path: str, message: str) -> None:
    with pytest.raises(InputMissing, match=message):
        names(Source(web + path), tmp_path / "x")


@pytest.mark.parametrize("address", ["169.254.169.254", "fe80::1%eth0"])
def test_a_name_that_resolves_to_the_node_is_not_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    def resolve(host: str, port: int, **_: object) -> list[tuple[object, ...]]:
        return [(0, 0, 0, "", (address, port))]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    with pytest.raises(UnsafeInput, match="link-local address of the node"):
        names(Source("https://innocent.example.org/chat.jsonl"), tmp_path / "x")


def test_https_trusts_no_unknown_authority(web: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SSL_CERT_FILE")
    with pytest.raises(InputMissing, match=r"certificate verify failed.*check the certificate"):
        names(Source(f"{web}/chat.jsonl"), tmp_path / "x")
