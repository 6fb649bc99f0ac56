"""`trimtab local run` and `trimtab local serve`."""

from __future__ import annotations

import asyncio
import json
import os
import shlex
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

from trimtab.local.cluster import Cluster
from trimtab.local.follow import Follower
from trimtab.local.objects import key
from trimtab.local.submit import submit
from trimtab.local.supervisor import die_with_parent
from trimtab.local.workdir import LocalError, Workdir
from trimtab.manifests.load import Document
from trimtab.progress import Display
from trimtab_operator.core.kube import FINETUNEJOB, MODELENDPOINT, Object
from trimtab_operator.core.log import configure

DONE, FAILED, INTERRUPTED = 0, 1, 130
_EXEC_GRACE_SECONDS = 5


async def run(documents: Sequence[Document], root: Path, command: str | None, display: Display) -> int:
    """Run checked manifests to their end; the exit code.

    Raises:
        InvalidManifest: an object can't become what its manifest says; nothing was started.
        LocalError: the folder or the machine does not allow it.
    """
    with ExitStack() as stack:
        cluster = _opened(root, stack)
        outcomes = await submit(cluster, documents)
        for name, outcome in outcomes.items():
            display.note(f"{name}: {outcome}")
        objects = [document.obj for document in documents]
        jobs = [obj for obj in objects if obj["kind"] == FINETUNEJOB.kind]
        cluster.training = {key(job) for job in jobs}
        follower = Follower(cluster, display)
        if jobs and follower.jobs_settled() and set(outcomes.values()) == {"unchanged"}:
            display.note("already complete, nothing to do" if command is None else "already complete, nothing to train")
            if command is None:
                return DONE
        cluster.serving = {key(obj) for obj in objects if obj["kind"] == MODELENDPOINT.kind}
        cluster.serving |= {
            (key(job)[0], job["spec"]["rollout"]["endpointName"]) for job in jobs if "rollout" in job["spec"]
        }
        code = DONE
        async with cluster.running():
            # One job's failure is no reason to stop the others.
            await cluster.until_or_interrupted(lambda: follower.jobs_settled() or bool(follower.crashed_endpoints()))
            await cluster.until_or_interrupted(lambda: follower.ready() or bool(follower.failures()))
            if cluster.interrupted.is_set():
                display.note("stopping; checkpoints are saved first (Ctrl-C again kills)")
            if failures := follower.failures():
                code = FAILED
            elif command is not None and not cluster.interrupted.is_set():
                display.pause()
                code = await _execute(command, cluster, display)
        for failure in failures:
            display.error(failure)
        return INTERRUPTED if cluster.interrupted.is_set() else code


async def serve(root: Path, display: Display) -> int:
    """Bring every endpoint of the folder up until Ctrl-C.

    Raises:
        LocalError: there is nothing to serve, or the machine does not allow it.
    """
    with ExitStack() as stack:
        if not Workdir(root).state.exists():
            raise LocalError(f"{root}: no working folder; first run: trimtab local run FILE --workdir {root}")
        cluster = _opened(root, stack)
        cluster.serving = {key(obj) for obj in cluster.kube.select(MODELENDPOINT)}
        if not cluster.serving:
            raise LocalError(f"{root}: holds no endpoint; give a job a rollout, or add a ModelEndpoint to its file")
        follower = Follower(cluster, display)
        async with cluster.running():
            await cluster.until_or_interrupted(lambda: follower.ready() or bool(follower.failures()))
            if not (failures := follower.failures()):
                for name in sorted(cluster.serving):
                    if obj := cluster.kube.find(MODELENDPOINT, *name):
                        display.note(_how_to_ask(obj))
                display.note("Ctrl-C stops")
                await cluster.interrupted.wait()
        for failure in failures:
            display.error(failure)
        return FAILED if failures else INTERRUPTED


def _opened(root: Path, stack: ExitStack) -> Cluster:
    """The folder, held and open until the stack unwinds; the operator's log goes to a file in it."""
    workdir = Workdir(root.resolve())
    lock = stack.enter_context(workdir.lock())
    configure(stream=stack.enter_context((workdir.root / "operator.log").open("a", encoding="utf-8")))
    cluster = Cluster(workdir, lock)
    stack.callback(cluster.state.close)
    return cluster


async def _execute(command: str, cluster: Cluster, display: Display) -> int:
    """Run the user's command, without a shell, while the endpoints are up."""
    urls: dict[str, str] = {}
    for name in sorted(cluster.serving):
        if obj := cluster.kube.find(MODELENDPOINT, *name):
            urls[name[1]] = obj["status"]["url"]
    environment = {f"TRIMTAB_ENDPOINT_{name.upper().replace('-', '_')}_URL": url for name, url in urls.items()}
    environment |= {"TRIMTAB_ENDPOINTS": json.dumps(urls), "TRIMTAB_WORKDIR": str(cluster.workdir.root)}
    words = shlex.split(command)
    try:
        process = await asyncio.create_subprocess_exec(
            *words, env={**os.environ, **environment}, preexec_fn=die_with_parent
        )
    except OSError as error:
        raise LocalError(f"--exec: {words[0]}: {error.strerror}; give a program and its arguments") from error
    ended = asyncio.ensure_future(process.wait())
    interrupted = asyncio.ensure_future(cluster.interrupted.wait())
    await asyncio.wait({ended, interrupted}, return_when=asyncio.FIRST_COMPLETED)
    interrupted.cancel()
    if not ended.done():
        with suppress(ProcessLookupError):
            process.terminate()
        await asyncio.wait({ended}, timeout=_EXEC_GRACE_SECONDS)
        with suppress(ProcessLookupError):
            process.kill()
    code = await ended
    if code != 0 and not cluster.interrupted.is_set():
        display.error(f"--exec: {words[0]} ended with exit code {code}; see its output above")
    return DONE if code == 0 else FAILED


def _how_to_ask(endpoint: Object) -> str:
    url, model = endpoint["status"]["url"], endpoint["spec"]["servedModelName"]
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": "Hello"}]})
    return f"{model}: {url}\n  curl {url}/chat/completions -H 'Content-Type: application/json' -d '{body}'"
