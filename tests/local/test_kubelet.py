"""What a kubelet does, shown of local mode's own with processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from tests.kube_contract.support import eventually
from tests.local.node import Node, holds, node

from trimtab.local.kube import SECRET
from trimtab.local.workdir import FolderInUse, Workdir
from trimtab_operator.core.kube import CONFIGMAP, JOB, POD, Object

SLEEP = "import time; time.sleep(3600)"
ON_TERM = "import signal, sys, time; signal.signal(signal.SIGTERM, {}); print('up', flush=True); time.sleep(3600)"


@pytest.fixture
async def local(tmp_path: Path) -> AsyncIterator[Node]:
    async with node(tmp_path) as running:
        yield running


def gone(pid: int) -> bool:
    """No such process, or a zombie that nobody has waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def number(path: Path) -> int | None:
    """The number in a file; None while there is none."""
    text = path.read_text() if path.exists() else ""
    return int(text) if text else None


async def number_in(path: Path) -> int:
    """The number in a file, once there is one."""

    async def read() -> int | None:
        return number(path)

    return await eventually(read)


@pytest.mark.parametrize(("code", "phase", "reason"), [(0, "Succeeded", "Completed"), (65, "Failed", "Error")])
async def test_the_end_of_a_container(local: Node, code: int, phase: str, reason: str) -> None:
    script = f"import os; open(os.environ['WHERE'], 'w').write('x' * 5000 + 'end'); print('said'); exit({code})"
    env = [{"name": "WHERE", "value": "/dev/termination-log"}]
    await local.run("p", script, container={"env": env})
    ended = await local.ended("p")
    assert (ended["exitCode"], ended["reason"]) == (code, reason)
    assert ended["message"] == "x" * 4093 + "end"
    assert local.pod("p")["status"]["phase"] == phase
    assert local.log("p") == "said\n"


async def test_a_program_that_is_not_there(local: Node) -> None:
    await local.run("p", "", container={"command": ["no-such-program"]})
    assert (await local.ended("p"))["exitCode"] == 127
    assert "no-such-program: No such file" in local.log("p")


@pytest.mark.parametrize(
    ("handler", "code"),
    [("lambda *_: sys.exit(75)", 75), ("signal.SIG_DFL", 128 + signal.SIGTERM), ("signal.SIG_IGN", 137)],
)
async def test_deletion_terminates_waits_and_kills(local: Node, handler: str, code: int) -> None:
    ends: list[Object] = []

    def heed(_: Any, obj: Object) -> None:
        if obj["kind"] == "Pod" and obj["status"]["phase"] == "Failed":
            ends.append(obj)

    local.kube.subscribe(heed)
    await local.run("p", ON_TERM.format(handler), terminationGracePeriodSeconds=1)
    await until_up(local, "p")
    local.kube.drop(local.pod("p"))

    async def removed() -> bool:
        return not local.pod("p")

    await eventually(removed)
    assert ends[-1]["status"]["containerStatuses"][0]["state"]["terminated"]["exitCode"] == code


async def until_up(local: Node, name: str) -> None:
    """Wait until the script has set its handler."""

    async def said() -> bool:
        return "up" in local.log(name)

    await eventually(said)


async def test_nothing_outlives_its_container(local: Node, tmp_path: Path) -> None:
    """Not even a process that has left its session and closed its ties."""
    pid_file = tmp_path / "pid"
    daemon = f"import os, time; os.setsid(); open({str(pid_file)!r}, 'w').write(str(os.getpid())); time.sleep(3600)"
    script = (
        f"import os, subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {daemon!r}])\n"
        f"while not (os.path.exists({str(pid_file)!r}) and open({str(pid_file)!r}).read()): time.sleep(0.02)"
    )
    await local.run("p", script)
    assert (await local.ended("p"))["exitCode"] == 0
    assert gone(int(pid_file.read_text()))


HOLDER = """
import asyncio, sys
from pathlib import Path
from tests.local.node import node

async def main():
    async with node(Path(sys.argv[1])) as running:
        await running.run("p", sys.argv[2], terminationGracePeriodSeconds=60)
        await asyncio.sleep(3600)

asyncio.run(main())
"""


def hold(root: Path, script: str) -> subprocess.Popen[bytes]:
    """A process that runs a pod until it is killed."""
    return subprocess.Popen([sys.executable, "-c", HOLDER, str(root), script])


async def test_kill_9_leaves_no_process_and_the_next_run_knows(tmp_path: Path) -> None:
    root, pid_file = tmp_path / "work", tmp_path / "pid"
    script = textwrap.dedent(f"""
        import os, signal, subprocess, sys, time
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        child = subprocess.Popen([sys.executable, "-c", {SLEEP!r}], start_new_session=True)
        open({str(pid_file)!r}, "w").write(str(child.pid))
        time.sleep(3600)
    """)
    holder = hold(root, script)
    try:
        grandchild = await number_in(pid_file)
        assert not gone(grandchild)
        with pytest.raises(FolderInUse, match=f"process {holder.pid} since 20"), Workdir(root).lock():
            pass
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    async with node(root) as again:
        assert gone(grandchild), "the lock is free only when the last process is gone"
        found = again.pod("p")
        assert found["status"]["phase"] == "Failed"
        assert holds(found, "DisruptionTarget")


async def test_stopping_saves_and_says_that_the_pod_was_disturbed(tmp_path: Path) -> None:
    async with node(tmp_path) as local:
        await local.run("p", ON_TERM.format("lambda *_: sys.exit(75)"))
        await until_up(local, "p")
    async with node(tmp_path) as local:
        found = local.pod("p")
        assert found["status"]["containerStatuses"][0]["state"]["terminated"]["exitCode"] == 75
        assert holds(found, "DisruptionTarget")


async def test_volumes(local: Node) -> None:
    head = {"metadata": {"namespace": "default", "name": "c"}, "apiVersion": "v1"}
    script = "import pathlib, sys; [print(pathlib.Path(p).read_text()) for p in sys.argv[1:3]]; " + (
        "[pathlib.Path(p, 'written').write_text('x') for p in sys.argv[3:]]"
    )
    mounts = {"config": "/etc/x", "secret": "/secrets", "scratch": "/tmp", "claim": "/data/claim"}
    volumes = [
        {"name": "config", "configMap": {"name": "c"}},
        {"name": "secret", "secret": {"secretName": "c"}},
        {"name": "scratch", "emptyDir": {}},
        {"name": "claim", "persistentVolumeClaim": {"claimName": "models"}},
    ]
    container = {
        "volumeMounts": [{"name": name, "mountPath": path} for name, path in mounts.items()],
        "args": ["/etc/x/file", "/secrets/key", "/tmp", "/data/claim"],
    }
    await local.run("p", script, container=container, volumes=volumes)

    async def reason() -> str | None:
        status = local.pod("p")["status"].get("containerStatuses", [{}])[0]
        return status.get("state", {}).get("waiting", {}).get("message")

    assert 'configmap "c" not found' in str(await eventually(reason))
    stage = {"data": [{"secretPath": "/secrets/s3"}], "template": "see /secrets/s3", "other": "/secretive"}
    local.kube.put({**head, "kind": CONFIGMAP.kind, "data": {"file": "from a map", "stage.json": json.dumps(stage)}})
    local.kube.put({**head, "kind": SECRET.kind, "data": {"key": "ZnJvbSBhIHNlY3JldA=="}})
    ended = await local.ended("p")
    assert ended["exitCode"] == 0, local.log("p")
    assert local.log("p") == "from a map\nfrom a secret\n"
    assert (local.workdir.claim("default", "models") / "written").read_text() == "x"
    seen = json.loads((local.workdir.pod("default", "p") / "volumes/config/stage.json").read_text())
    assert seen["data"][0]["secretPath"] not in ("", "/secrets/s3")
    assert seen["data"][0]["secretPath"].endswith("/secret/s3")
    assert (seen["template"], seen["other"]) == ("see /secrets/s3", "/secretive")
    left = [
        path for path in local.workdir.root.rglob("*") if path.is_file() and path.name not in ("log", "state.sqlite3")
    ]
    assert not [path for path in left if b"a secret" in path.read_bytes()], "a secret does not stay behind"


async def test_crashes_back_off_and_keep_the_last_words(local: Node) -> None:
    script = "import os; open(os.environ['WHERE'], 'w').write('why'); exit(66)"
    env = [{"name": "WHERE", "value": "/dev/termination-log"}]
    await local.run("p", script, restartPolicy="Always", container={"env": env})

    async def crashed_twice() -> dict[str, Any] | None:
        status = local.pod("p")["status"].get("containerStatuses", [{}])[0]
        waiting = status.get("state", {}).get("waiting", {}).get("reason") == "CrashLoopBackOff"
        return status if waiting and status["restartCount"] == 2 else None

    status = await eventually(crashed_twice)
    assert status["lastState"]["terminated"]["exitCode"] == 66
    assert status["lastState"]["terminated"]["message"] == "why"


SERVER = """
import http.server, os, pathlib, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        path = pathlib.Path(sys.argv[1], self.path.strip("/"))
        self.send_response(200 if path.exists() else 503)
        self.end_headers()
        self.wfile.write(os.environ["NAME"].encode())
    def log_message(self, *_): pass
http.server.ThreadingHTTPServer((os.environ["IP"], 8000), Handler).serve_forever()
"""


def server(name: str, flags: Path, **probes: Any) -> dict[str, Any]:
    """A container that answers 200 for each path that is a file in `flags`, with its name."""
    env = [
        {"name": "IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
        {"name": "NAME", "value": name},
    ]
    return {"args": [str(flags)], "env": env, "ports": [{"name": "http", "containerPort": 8000}], **probes}


def http_probe(path: str, **more: Any) -> dict[str, Any]:
    return {"httpGet": {"path": path, "port": "http"}, "periodSeconds": 0.1, "failureThreshold": 2, **more}


async def test_probes(local: Node, tmp_path: Path) -> None:
    flags = tmp_path / "flags"
    flags.mkdir()
    check = ["python", "-c", f"import os; exit(not os.path.exists({str(flags / 'started')!r}))"]
    probes = {
        "startupProbe": {
            "exec": {"command": check},
            "periodSeconds": 0.1,
            "failureThreshold": 10**6,
            "timeoutSeconds": 20,
        },
        "readinessProbe": http_probe("/ready", timeoutSeconds=20),
        "livenessProbe": http_probe("/alive", timeoutSeconds=20),
    }
    await local.run("p", SERVER, restartPolicy="Always", container=server("p", flags, **probes))
    await local.phase("p", "Running")
    (flags / "ready").touch()
    (flags / "alive").touch()
    assert not holds(local.pod("p"), "Ready"), "not before the startup probe"
    (flags / "started").touch()
    await local.ready("p")
    (flags / "ready").unlink()

    async def unready() -> bool:
        return not holds(local.pod("p"), "Ready")

    await eventually(unready)
    assert local.pod("p")["status"]["containerStatuses"][0]["restartCount"] == 0
    (flags / "alive").unlink()

    async def restarted() -> bool:
        return bool(local.pod("p")["status"]["containerStatuses"][0]["restartCount"])

    await eventually(restarted)
    assert "liveness probe failed" in local.log("p")


async def test_a_container_that_never_starts_is_ended(local: Node) -> None:
    probe = {"exec": {"command": ["python", "-c", "exit(1)"]}, "periodSeconds": 0.1, "failureThreshold": 2}
    await local.run("p", SLEEP, container={"startupProbe": probe | {"timeoutSeconds": 20}})
    assert (await local.ended("p"))["exitCode"] == 128 + signal.SIGTERM


async def test_a_jobs_pods_find_each_other_by_name(local: Node) -> None:
    script = textwrap.dedent("""
        import os, socket, time
        host, port = os.environ["FIRST"].split(":")
        if os.environ["JOB_COMPLETION_INDEX"] == "0":
            listener = socket.create_server((os.environ["IP"], int(port)))
            print(listener.accept()[0].recv(9).decode())
        else:
            while True:
                try:
                    socket.create_connection((host, int(port))).sendall(b"from one")
                    break
                except ConnectionRefusedError:
                    time.sleep(0.05)
    """)
    env = [
        {"name": "FIRST", "value": "pair-0.pair.default.svc:29500"},
        {"name": "IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
    ]
    container = {"name": "main", "image": "none", "command": ["python", "-c", script], "env": env}
    template = {"metadata": {}, "spec": {"subdomain": "pair", "restartPolicy": "Never", "containers": [container]}}
    spec = {"completionMode": "Indexed", "completions": 2, "parallelism": 2, "backoffLimit": 0, "template": template}
    metadata = {"name": "pair", "namespace": "default"}
    local.kube.put({"apiVersion": JOB.api_version, "kind": JOB.kind, "metadata": metadata, "spec": spec})

    async def complete() -> bool:
        return holds(local.kube.find(JOB, "default", "pair") or {}, "Complete")

    await eventually(complete)
    first = next(pod for pod in local.kube.select(POD) if pod["metadata"]["name"].startswith("pair-0-"))
    assert local.log(first["metadata"]["name"]) == "from one\n"


async def test_jobs_queue_for_the_machine(local: Node, tmp_path: Path) -> None:
    cores = len(os.sched_getaffinity(0))
    flag = tmp_path / "go"
    script = f"import os, time\nwhile not os.path.exists({str(flag)!r}): time.sleep(0.05)"
    for name in ("one", "two"):
        container = {
            "name": "main",
            "command": ["python", "-c", script],
            "resources": {"requests": {"cpu": str(cores)}},
        }
        template = {
            "metadata": {"labels": {"job": name}},
            "spec": {"restartPolicy": "Never", "containers": [container]},
        }
        metadata = {"name": name, "namespace": "default"}
        spec = {"backoffLimit": 0, "template": template}
        local.kube.put({"apiVersion": JOB.api_version, "kind": JOB.kind, "metadata": metadata, "spec": spec})

    async def queued() -> Object | None:
        (pod,) = local.kube.select(POD, labels={"job": "two"}) or [{}]
        return pod if "conditions" in pod.get("status", {}) else None

    waiting = await eventually(queued)
    (condition,) = waiting["status"]["conditions"]
    assert (condition["reason"], condition["status"]) == ("Unschedulable", "False")
    assert "Insufficient cpu" in condition["message"]
    flag.touch()

    async def both_complete() -> bool:
        return all(holds(local.kube.find(JOB, "default", name) or {}, "Complete") for name in ("one", "two"))

    await eventually(both_complete)
