"""`Kube` against a real API server: raw JSON over one shared aiohttp session."""

from __future__ import annotations

import asyncio
import json
import random
import re
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import quote

import aiohttp

from trimtab_operator.core.credentials import Credentials
from trimtab_operator.core.errors import Conflict, KubeError, NotFound, Unavailable, kube_error
from trimtab_operator.core.kube import Kind, Object, kind_of
from trimtab_operator.core.rate import TokenBucket

PAGE = 500
_APPLY = "application/apply-patch+yaml"
_JSON = "application/json"
_METADATA = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1,application/json"
_TIMEOUT = aiohttp.ClientTimeout(total=30, sock_connect=5)
_READ_ATTEMPTS = 4
_LONGEST_PAUSE_SECONDS = 10.0
_UNAUTHORIZED = 401
_GONE = 410
_UNPROCESSABLE = 422
_FIRST_ERROR = 400
_ESCAPED = re.compile("[\x7f-\uffff]")

Keep = Callable[[Object], Object]
"""Takes a listed object and returns what is wanted of it."""
Observe = Callable[[str, int], None]
"""Takes the verb and HTTP status of each request; 0 where there was no answer."""
Fence = Callable[[], None]
"""Raises a `KubeError` where this process may not write."""


class ApiServer:
    """The API server of a cluster, as `Kube`. `connect()` makes one."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        credentials: Credentials,
        bucket: TokenBucket,
        observe: Observe = lambda verb, code: None,
        read_attempts: int = _READ_ATTEMPTS,
        keep: Keep = lambda obj: obj,
    ) -> None:
        self._session = session
        self._keep = keep
        self._credentials = credentials
        self._bucket = bucket
        self._observe = observe
        self._read_attempts = read_attempts

    async def get(self, kind: Kind, namespace: str, name: str) -> Object | None:
        """See `Kube.get`; NotFound where the kind itself is unknown."""
        try:
            return await self._read(_path(kind, namespace, name))
        except NotFound as error:
            _only_absent(error)
            return None

    async def list_objects(
        self,
        kind: Kind,
        *,
        namespace: str | None = None,
        labels: Mapping[str, str | None] | None = None,
        fields: Mapping[str, str] | None = None,
    ) -> list[Object]:
        """See `Kube.list_objects`."""
        return await self._list(kind, namespace, labels, _JSON, fields)

    async def list_metadata(
        self, kind: Kind, *, namespace: str | None = None, labels: Mapping[str, str | None] | None = None
    ) -> list[Object]:
        """See `Kube.list_metadata`."""
        return await self._list(kind, namespace, labels, _METADATA)

    async def create(self, obj: Object, *, manager: str) -> Object:
        """See `Kube.create`."""
        path = _path(kind_of(obj), obj["metadata"]["namespace"])
        return await self._request("POST", path, body=obj, params={"fieldManager": manager})

    async def replace(self, obj: Object, *, manager: str) -> Object:
        """PUT; `Conflict` where the resourceVersion in it is not the live one. For `leader.Leases`."""
        path = _path(kind_of(obj), obj["metadata"]["namespace"], obj["metadata"]["name"])
        return await self._request("PUT", path, body=obj, params={"fieldManager": manager})

    async def apply(self, obj: Object, *, manager: str) -> Object:
        """See `Kube.apply`."""
        return await self._apply(obj, manager, "")

    async def apply_status(self, obj: Object, *, manager: str) -> Object:
        """See `Kube.apply_status`."""
        return await self._apply(obj, manager, "/status")

    async def delete(
        self, kind: Kind, namespace: str, name: str, *, uid: str | None = None, version: str | None = None
    ) -> None:
        """See `Kube.delete`."""
        options: Object = {"apiVersion": "v1", "kind": "DeleteOptions", "propagationPolicy": "Background"}
        required = {"uid": uid, "resourceVersion": version}
        if preconditions := {key: value for key, value in required.items() if value is not None}:
            options["preconditions"] = preconditions
        try:
            await self._request("DELETE", _path(kind, namespace, name), body=options)
        except NotFound as error:
            _only_absent(error)

    async def _apply(self, obj: Object, manager: str, subresource: str) -> Object:
        metadata = obj["metadata"]
        path = _path(kind_of(obj), metadata["namespace"], metadata["name"]) + subresource
        params = {"fieldManager": manager, "force": "true"}
        return await self._request("PATCH", path, body=obj, params=params, content_type=_APPLY)

    async def _list(
        self,
        kind: Kind,
        namespace: str | None,
        labels: Mapping[str, str | None] | None,
        accept: str,
        fields: Mapping[str, str] | None = None,
    ) -> list[Object]:
        params = {"limit": str(PAGE)}
        if fields:
            params["fieldSelector"] = ",".join(f"{path}={value}" for path, value in fields.items())
        if labels:
            params["labelSelector"] = ",".join(
                key if value is None else f"{key}={value}" for key, value in labels.items()
            )
        path = _path(kind, namespace)
        objects: list[Object] = []
        token = ""
        while True:
            try:
                page = await self._read(path, params | ({"continue": token} if token else {}), accept)
            except KubeError as error:
                if error.code != _GONE or not token:
                    raise
                # The token is older than what etcd keeps: begin again, in one piece so that it can't happen twice.
                objects, token = [], ""
                params.pop("limit", None)
                continue
            for item in page["items"] or []:
                objects.append(self._keep({**item, "apiVersion": kind.api_version, "kind": kind.kind}))
            token = page["metadata"].get("continue", "")
            if not token:
                return objects

    async def _read(self, path: str, params: Mapping[str, str] | None = None, accept: str = _JSON) -> Object:
        """A GET, asked again a few times while the server is unavailable; writes are repeated by the next plan only."""
        for attempt in range(1, self._read_attempts):
            try:
                return await self._request("GET", path, params=params, accept=accept)
            except Unavailable as error:
                pause = max(error.retry_after or 0.0, 0.2 * 2**attempt)
                await asyncio.sleep(min(pause, _LONGEST_PAUSE_SECONDS) * random.uniform(1.0, 1.2))  # noqa: S311
        return await self._request("GET", path, params=params, accept=accept)

    async def _request(
        self,
        verb: str,
        path: str,
        *,
        params: Mapping[str, str] | None = None,
        body: Object | None = None,
        content_type: str = _JSON,
        accept: str = _JSON,
    ) -> Object:
        headers = {"Accept": accept}
        data = None
        if body is not None:
            headers["Content-Type"] = content_type
            data = _encode(body)
        code, text, retry_after = await self._send(verb, path, params, data, headers)
        if code == _UNAUTHORIZED:
            await self._credentials.renew()
            code, text, retry_after = await self._send(verb, path, params, data, headers)
        if code >= _FIRST_ERROR:
            raise _error(verb, path, code, text, retry_after)
        try:
            answer: Object = json.loads(text)
        except ValueError as error:
            raise Unavailable(code, "BadAnswer", f"{verb} {path}: the answer is not JSON: {text[:200]!r}") from error
        return answer

    async def _send(
        self, verb: str, path: str, params: Mapping[str, str] | None, data: str | None, headers: Mapping[str, str]
    ) -> tuple[int, str, str | None]:
        """One HTTP request: status, body and Retry-After of its answer."""
        await self._bucket.take()
        authorization = await self._credentials.authorization()
        code = 0
        try:
            async with self._session.request(
                verb,
                self._credentials.server + path,
                params=params,
                data=data,
                headers={**headers, "Authorization": authorization} if authorization else headers,
                proxy=self._credentials.proxy,
                server_hostname=self._credentials.server_name,
            ) as response:
                text = await response.text()
                code = response.status
                return code, text, response.headers.get("Retry-After")
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise Unavailable(0, type(error).__name__, f"{verb} {path}: no answer: {error}") from error
        finally:
            self._observe(verb, code)


@asynccontextmanager
async def connect(
    credentials: Credentials,
    *,
    requests_per_second: float,
    burst: int,
    observe: Observe = lambda verb, code: None,
    user_agent: str = "trimtab-operator",
    fence: Fence = lambda: None,
    read_attempts: int = _READ_ATTEMPTS,
    keep: Keep = lambda obj: obj,
) -> AsyncIterator[ApiServer]:
    """An `ApiServer` whose session lives as long as the block.

    Args:
        credentials: Where the server is and who we are.
        requests_per_second: Rate in the long run.
        burst: How many requests may go out at once.
        observe: Told of each request's end.
        user_agent: Tells replicas apart in the audit log.
        fence: Asked as the last thing before each write leaves, repetitions by the HTTP library included.
        read_attempts: How often a GET is sent while the server is unavailable.
        keep: What a list keeps of each object, page by page, so that the whole is never in memory.
    """
    secure = credentials.server.startswith("https:")
    connector = aiohttp.TCPConnector(limit=64, ssl=credentials.ssl_context() if secure else True)

    class Fenced(aiohttp.ClientRequest):
        # Here the connection is there: neither the rate limit, the pool nor a handshake comes between check and write.
        async def send(self, conn: Any) -> aiohttp.ClientResponse:
            if self.method != "GET":
                fence()
            return await super().send(conn)

        # A body is sent, with its headers, by a task that may begin a whole turn of the loop later.
        async def write_bytes(self, writer: Any, conn: Any, content_length: int | None = None) -> None:
            try:
                fence()
            except KubeError as error:
                conn.protocol.set_exception(error)  # what the request then ends with
                conn.close()
            else:
                await super().write_bytes(writer, conn, content_length)

    async with aiohttp.ClientSession(
        connector=connector, timeout=_TIMEOUT, request_class=Fenced, headers={"User-Agent": user_agent}
    ) as session:
        bucket = TokenBucket(requests_per_second, burst)
        yield ApiServer(session, credentials, bucket, observe, read_attempts, keep)


def _encode(body: Object) -> str:
    """JSON that is YAML as well, as which the API server reads what is applied.

    YAML has no pairs of surrogates, so what JSON can escape only as a pair stands bare. Other characters it forbids or
    folds, so all others are escaped.
    """
    return _ESCAPED.sub(lambda found: f"\\u{ord(found[0]):04x}", json.dumps(body, ensure_ascii=False))


def _path(kind: Kind, namespace: str | None, name: str | None = None) -> str:
    """URL path; each part from outside is quoted, so that none can reach another resource."""
    parts = [kind.path]
    if namespace is not None:
        parts += ["namespaces", quote(namespace, safe="")]
    parts.append(kind.plural)
    if name is not None:
        parts.append(quote(name, safe=""))
    return "/".join(parts)


def _only_absent(error: NotFound) -> None:
    """A 404 about the object means that it is not there; one about its kind or the path is raised again."""
    if error.reason != "NotFound":
        raise error


def _error(verb: str, path: str, code: int, text: str, retry_after: str | None) -> KubeError:
    """From a Status object, or from whatever a proxy in between answers."""
    status: dict[str, Any] = {}
    try:
        parsed = json.loads(text)
    except ValueError:
        parsed = None
    if isinstance(parsed, dict) and parsed.get("kind") == "Status":
        status = parsed
    message = status.get("message") or f"{verb} {path}: {text[:500].strip() or 'no message'}"
    if code == _UNAUTHORIZED:
        message += "; the API server does not accept our credentials"
    seconds = retry_after or (status.get("details") or {}).get("retryAfterSeconds")
    try:
        wait = float(seconds) if seconds else None
    except (TypeError, ValueError):  # an HTTP date: no Kubernetes API server sends one
        wait = None
    if code == _UNPROCESSABLE and _causes(status) == {"metadata.uid"}:
        # Some kinds report a wrong uid in an apply so, others as a conflict.
        return Conflict(code, "Conflict", message)
    return kube_error(code, status.get("reason") or f"HTTP {code}", message, wait)


def _causes(status: dict[str, Any]) -> set[str]:
    """The fields that a Status object complains of."""
    return {cause.get("field", "") for cause in (status.get("details") or {}).get("causes") or []}
