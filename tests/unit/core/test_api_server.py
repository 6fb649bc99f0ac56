"""The client's own part of the protocol, against a server that answers as the test says."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from trimtab_operator.core import api_server
from trimtab_operator.core.api_server import ApiServer, Fence, connect
from trimtab_operator.core.credentials import CredentialsError, load
from trimtab_operator.core.errors import Conflict, Forbidden, Invalid, KubeError, NotFound, Unavailable
from trimtab_operator.core.kube import CONFIGMAP, FINETUNEJOB

OBJECT = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "a", "namespace": "n"}}


def failure(code: int, reason: str, **more: Any) -> web.Response:
    headers = more.pop("headers", {})
    status = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "reason": reason}
    return web.json_response(status | {"message": f"said {reason}"} | more, status=code, headers=headers)


@dataclass
class Server:
    """Answers in turn; the last answer again and again."""

    answers: list[Callable[[], web.Response]] = field(default_factory=list)
    requests: list[web.Request] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)

    async def handle(self, request: web.Request) -> web.Response:
        self.requests.append(request)
        self.bodies.append(await request.read())
        return (self.answers.pop(0) if len(self.answers) > 1 else self.answers[0])()


@dataclass
class Client:
    kube: ApiServer
    server: Server
    kubeconfig: Path
    counted: list[tuple[str, int]]


@pytest.fixture
async def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Client]:
    monkeypatch.setattr(api_server, "_LONGEST_PAUSE_SECONDS", 0.01)
    server = Server()
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", server.handle)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    path = tmp_path / "kubeconfig"
    write_kubeconfig(path, f"http://127.0.0.1:{runner.addresses[0][1]}", "first")
    monkeypatch.setenv("KUBECONFIG", str(path))
    counted: list[tuple[str, int]] = []
    async with connect(
        await load(), requests_per_second=500, burst=1000, observe=lambda *seen: counted.append(seen)
    ) as kube:
        yield Client(kube, server, path, counted)
    await runner.cleanup()


def write_kubeconfig(path: Path, server: str, token: str) -> None:
    config = {
        "clusters": [{"name": "c", "cluster": {"server": server}}],
        "users": [{"name": "u", "user": {"token": token}}],
        "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
        "current-context": "x",
    }
    path.write_text(json.dumps(config))


def page(names: list[str], token: str = "") -> Callable[[], web.Response]:
    items = [{"metadata": {"name": name}} for name in names]
    return lambda: web.json_response({"metadata": {"continue": token}, "items": items})


async def test_lists_come_in_pages(client: Client) -> None:
    client.server.answers = [page(["a"], "more"), page(["b"])]
    listed = await client.kube.list_objects(FINETUNEJOB, namespace="n", labels={"k": "v", "p": None})
    assert [(obj["kind"], obj["metadata"]["name"]) for obj in listed] == [("FineTuneJob", "a"), ("FineTuneJob", "b")]
    first, second = client.server.requests
    assert first.path == "/apis/trimtab.dev/v1alpha1/namespaces/n/finetunejobs"
    assert first.query == {"limit": "500", "labelSelector": "k=v,p"}
    assert second.query["continue"] == "more"


async def test_a_list_whose_token_is_too_old_begins_again(client: Client) -> None:
    client.server.answers = [page(["a"], "old"), lambda: failure(410, "Expired"), page(["a", "b"])]
    assert len(await client.kube.list_objects(CONFIGMAP)) == 2
    assert "limit" not in client.server.requests[2].query
    assert "continue" not in client.server.requests[2].query
    client.server.answers = [lambda: failure(410, "Expired")]
    with pytest.raises(KubeError):
        await client.kube.list_objects(CONFIGMAP)


async def test_reads_are_repeated_and_writes_are_not(client: Client) -> None:
    client.server.answers = [lambda: failure(503, "ServiceUnavailable"), lambda: web.json_response(OBJECT)]
    assert await client.kube.get(CONFIGMAP, "n", "a") == OBJECT
    client.server.answers = [lambda: failure(429, "TooManyRequests", headers={"Retry-After": "7"})]
    for write in (client.kube.create, client.kube.apply, client.kube.apply_status):
        client.server.requests.clear()
        with pytest.raises(Unavailable) as raised:
            await write(OBJECT, manager="m")
        assert raised.value.retry_after == 7
        assert len(client.server.requests) == 1
    client.server.requests.clear()
    with pytest.raises(Unavailable):
        await client.kube.get(CONFIGMAP, "n", "a")
    assert len(client.server.requests) == 4
    assert client.counted[:2] == [("GET", 503), ("GET", 200)]


async def test_only_a_missing_object_is_none(client: Client) -> None:
    client.server.answers = [lambda: failure(404, "NotFound")]
    assert await client.kube.get(CONFIGMAP, "n", "a") is None
    await client.kube.delete(CONFIGMAP, "n", "a")
    client.server.answers = [lambda: web.Response(status=404, text="404 page not found")]
    with pytest.raises(NotFound, match="page not found"):
        await client.kube.get(FINETUNEJOB, "n", "a")
    with pytest.raises(NotFound):
        await client.kube.delete(FINETUNEJOB, "n", "a")


@pytest.mark.parametrize(
    ("code", "reason", "more", "error"),
    [
        (409, "Conflict", {}, Conflict),
        (422, "Invalid", {}, Invalid),
        (422, "Invalid", {"details": {"causes": [{"field": "metadata.uid"}]}}, Conflict),
        (403, "Forbidden", {}, Forbidden),
        (500, "InternalError", {"details": {"retryAfterSeconds": 3}}, Unavailable),
    ],
)
async def test_errors_have_their_class(
    client: Client, code: int, reason: str, more: Any, error: type[KubeError]
) -> None:
    client.server.answers = [lambda: failure(code, reason, **more)]
    with pytest.raises(error, match=f"said {reason}") as raised:
        await client.kube.apply(OBJECT, manager="m")
    assert type(raised.value) is error
    assert raised.value.retry_after == (3 if "retryAfterSeconds" in str(more) else None)


async def test_what_is_not_kubernetes_is_unavailable(client: Client) -> None:
    client.server.answers = [lambda: web.Response(text="<html>hello</html>")]
    with pytest.raises(Unavailable, match="not JSON"):
        await client.kube.apply(OBJECT, manager="m")
    client.server.answers = [lambda: web.Response(status=502, text="bad gateway")]
    with pytest.raises(Unavailable, match="bad gateway"):
        await client.kube.apply(OBJECT, manager="m")


async def test_no_answer_is_unavailable(client: Client) -> None:
    with socket.socket() as taken:  # bound, and nobody listens
        taken.bind(("127.0.0.1", 0))
        write_kubeconfig(client.kubeconfig, f"http://127.0.0.1:{taken.getsockname()[1]}", "first")
    counted: list[tuple[str, int]] = []
    async with connect(
        await load(), requests_per_second=500, burst=1000, observe=lambda *seen: counted.append(seen)
    ) as kube:
        with pytest.raises(Unavailable, match="no answer"):
            await kube.create(OBJECT, manager="m")
    assert counted == [("POST", 0)]


async def test_a_refused_token_is_read_again(client: Client) -> None:
    server = client.kube._credentials.server
    client.server.answers = [lambda: failure(401, "Unauthorized"), lambda: web.json_response(OBJECT)]
    write_kubeconfig(client.kubeconfig, server, "second")
    assert await client.kube.get(CONFIGMAP, "n", "a") == OBJECT
    assert [request.headers["Authorization"] for request in client.server.requests] == ["Bearer first", "Bearer second"]


async def test_names_stay_in_their_place(client: Client) -> None:
    client.server.answers = [lambda: failure(404, "NotFound")]
    await client.kube.get(CONFIGMAP, "n/x", "a/../../secrets/b?watch#c")
    (request,) = client.server.requests
    assert request.raw_path == "/api/v1/namespaces/n%2Fx/configmaps/a%2F..%2F..%2Fsecrets%2Fb%3Fwatch%23c"


async def test_writes_say_who_and_how(client: Client) -> None:
    client.server.answers = [lambda: web.json_response(OBJECT)]
    await client.kube.apply(OBJECT, manager="m")
    await client.kube.apply_status(OBJECT, manager="m")
    await client.kube.delete(CONFIGMAP, "n", "a", uid="u", version="7")
    apply, status, delete = client.server.requests
    assert (apply.method, apply.path, dict(apply.query)) == (
        "PATCH",
        "/api/v1/namespaces/n/configmaps/a",
        {"fieldManager": "m", "force": "true"},
    )
    assert apply.headers["Content-Type"] == "application/apply-patch+yaml"
    assert status.path == "/api/v1/namespaces/n/configmaps/a/status"
    assert (delete.method, json.loads(client.server.bodies[2])["propagationPolicy"]) == ("DELETE", "Background")
    assert json.loads(client.server.bodies[2])["preconditions"] == {"uid": "u", "resourceVersion": "7"}


async def test_without_a_cluster_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "absent"))
    with pytest.raises(CredentialsError, match="set KUBECONFIG"):
        await load()


@asynccontextmanager
async def fenced(
    tmp_path: Path, fence: Fence, handle: Callable[[web.Request], web.Response]
) -> AsyncIterator[ApiServer]:
    """A client with that fence, and a server that answers by `handle`."""

    async def answer(request: web.Request) -> web.Response:
        return handle(request)

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    write_kubeconfig(tmp_path / "kubeconfig", f"http://127.0.0.1:{runner.addresses[0][1]}", "t")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
        async with connect(
            await load(), requests_per_second=500, burst=1000, user_agent="me/1 (a)", fence=fence
        ) as kube:
            yield kube
    await runner.cleanup()


async def test_the_fence_is_asked_before_each_write_leaves(tmp_path: Path) -> None:
    """Also before one that the HTTP library sends again, and after all that a request may have waited for."""
    leading = True
    seen: list[tuple[str, str]] = []

    def fence() -> None:
        if not leading:
            raise Unavailable(0, "NotLeading", "not sent")

    def handle(request: web.Request) -> web.Response:
        nonlocal leading
        seen.append((request.method, request.headers["User-Agent"]))
        if request.method == "DELETE":  # of a connection that was kept: aiohttp repeats it on a new one
            leading = False
            assert request.transport is not None
            request.transport.abort()
        return web.json_response(OBJECT)

    async with fenced(tmp_path, fence, handle) as kube:
        await kube.apply(OBJECT, manager="m")
        with pytest.raises(Unavailable, match="not sent"):
            await kube.delete(CONFIGMAP, "n", "a")
        assert [method for method, _ in seen] == ["PATCH", "DELETE"]
        await kube.get(CONFIGMAP, "n", "a")
        for write in (kube.create, kube.apply, kube.apply_status, kube.replace):
            with pytest.raises(Unavailable, match="not sent"):
                await write(OBJECT, manager="m")
    assert seen[2:] == [("GET", "me/1 (a)")]


async def test_nothing_leaves_a_turn_of_the_loop_after_the_fence_was_asked(tmp_path: Path) -> None:
    """A process that is stopped between the question and the write goes on after others lead."""
    seen: list[str] = []
    lost = False

    def fence() -> None:
        if lost:
            raise Unavailable(0, "NotLeading", "not sent")
        asyncio.get_running_loop().call_soon(lose)

    def lose() -> None:
        nonlocal lost
        lost = True

    def handle(request: web.Request) -> web.Response:
        seen.append(request.method)
        return web.json_response(OBJECT)

    async with fenced(tmp_path, fence, handle) as kube:
        await kube.get(CONFIGMAP, "n", "a")  # the connection is there
        with pytest.raises(Unavailable, match="not sent"):
            await kube.apply(OBJECT, manager="m")
        assert seen == ["GET"]
        lost = False
        assert await kube.get(CONFIGMAP, "n", "a") == OBJECT
