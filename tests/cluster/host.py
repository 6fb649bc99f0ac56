"""What a node leaves on its machine, and how it goes away: processes, control groups, mounts, links, the bridge.

Everything that the tier makes lies below one folder, and whatever runs because of it has that folder in its command
line or lives in the kubelet's control groups. So a run that was killed is cleaned up by the next one, by that folder.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import psutil

ADDRESS = "10.88.0.1"
BRIDGE = "trimtab0"
NODE = "n1"
_CLAIM = "\0trimtab-cluster"
"""A socket's abstract name: who has it has the machine, and it ends with its holder."""
ROOT_VARIABLE = "TRIMTAB_CLUSTER_ROOT"

PROGRAMS = {
    "buildah": "buildah",
    "mmdebstrap": "mmdebstrap",
    "nft": "nftables",
    "ip": "iproute2",
    "mount": "mount",
    "setpriv": "util-linux",
}
"""Program -> the Debian package that has it."""
_NAMES = frozenset(
    {
        "etcd",
        "kube-apiserver",
        "kube-controller",
        "kube-scheduler",
        "kube-proxy",
        "kubelet",
        "containerd",
        "containerd-shim",
        "coredns",
        "buildah",
        "mmdebstrap",
    }
)
"""As the kernel knows them: 15 characters."""
_KUBE_PROXY_TABLES = (("ip", "kube-proxy"), ("ip6", "kube-proxy"))
_GROUPS = Path("/sys/fs/cgroup")
_CONTAINER_LOGS = Path("/var/log/containers")
_FORWARD = Path("/proc/sys/net/ipv4/ip_forward")
_SETTINGS = (
    _FORWARD,
    *(Path("/proc/sys/vm", name) for name in ("overcommit_memory", "panic_on_oom")),
    *(Path("/proc/sys/kernel", name) for name in ("panic", "panic_on_oops", "keys/root_maxkeys", "keys/root_maxbytes")),
)
"""Of the kernel: pods need the first, and a kubelet sets the others."""
_BEFORE = "before.json"
"""How the machine was, in the folder of the run."""
_ELSEWHERE = tuple(
    Path(folder)
    for folder in (
        "/etc/cni",
        "/run/containerd",
        "/run/containers",
        "/run/nri",
        "/var/lib/cni",
        "/var/lib/containers",
        "/var/lib/kubelet",
    )
)
"""Folders of fixed name that are used beside those that the programs are told; removed where they were not before."""


class HostError(RuntimeError):
    """The machine can't be a node; the message says why and what to do."""


def folder() -> Path:
    """Where everything lies: `$TRIMTAB_CLUSTER_ROOT`, else below /var/tmp, which is on a disk."""
    return Path(os.environ.get(ROOT_VARIABLE, "/var/tmp/trimtab-cluster"))


def check() -> None:
    """Raises `HostError` where this machine can't run the tier."""
    if os.geteuid() != 0 or os.uname().sysname != "Linux":
        raise HostError("the cluster tier makes a node of this machine: run `make test-cluster` as root, on Linux")
    if missing := sorted({package for name, package in PROGRAMS.items() if shutil.which(name) is None}):
        raise HostError(f"the cluster tier lacks programs: apt-get install --no-install-recommends {' '.join(missing)}")
    others = [p.pid for p in psutil.process_iter(["name", "pid"]) if p.info["name"] in ("kubelet", "containerd")]
    if foreign := [pid for pid in others if str(folder()) not in command_line(pid)]:
        raise HostError(
            f"another kubelet or containerd runs here (process {foreign[0]}): stop it, or use another machine"
        )


@contextlib.contextmanager
def machine() -> Iterator[Path]:
    """The empty folder of one run, with the bridge up; afterwards all of it is gone, a former run's leftovers too.

    Raises:
        HostError: another run holds the machine, it can't be a node, or something is left on it.
    """
    check()
    root = folder()
    root.parent.mkdir(parents=True, exist_ok=True)
    with socket.socket(socket.AF_UNIX) as claim:
        try:
            claim.bind(_CLAIM)
        except OSError as error:
            raise HostError("another run of the cluster tier holds this machine: wait for its end") from error
        sweep(root)
        before = traces(root)
        root.mkdir()
        settings = {str(path): path.read_text() for path in _SETTINGS}
        absent = [str(path) for path in _ELSEWHERE if not path.exists()]
        (root / _BEFORE).write_text(json.dumps({"settings": settings, "absent": absent}))
        try:
            _run("ip", "link", "add", BRIDGE, "type", "bridge")
            _run("ip", "address", "add", f"{ADDRESS}/24", "dev", BRIDGE)
            _run("ip", "link", "set", BRIDGE, "up")
            _FORWARD.write_text("1")
            yield root
        finally:
            sweep(root)
        if left := sorted(traces(root) - before):
            raise HostError(f"the run left on this machine: {'; '.join(left)}")


def sweep(root: Path) -> None:
    """Removes what a run below `root` left, in the order in which one thing holds another."""
    _end(processes(root))  # first who would start containers anew, shims included
    _end(pod_processes())
    for point in mounts(root):
        if subprocess.run(["umount", point], capture_output=True, check=False).returncode:
            _run("umount", "--lazy", point)
    for group in pod_groups():
        for path in sorted((found for found in group.rglob("*") if found.is_dir()), reverse=True):
            path.rmdir()
        group.rmdir()
    for link in _CONTAINER_LOGS.glob("*.log"):
        if link.is_symlink() and link.readlink().is_relative_to(root):
            link.unlink()
    with contextlib.suppress(OSError):  # others' logs, or no such folder
        _CONTAINER_LOGS.rmdir()
    subprocess.run(["ip", "link", "delete", BRIDGE], capture_output=True, check=False)
    for family, table in _KUBE_PROXY_TABLES:
        subprocess.run(["nft", "delete", "table", family, table], capture_output=True, check=False)
    if (root / _BEFORE).exists():
        before = json.loads((root / _BEFORE).read_text())
        for path, value in before["settings"].items():
            Path(path).write_text(value)
        for path in before["absent"]:
            shutil.rmtree(path, ignore_errors=True)
    if root.exists():
        shutil.rmtree(root)


def traces(root: Path) -> set[str]:
    """What this machine has of all that a node below `root` makes or changes, in words."""
    tables = json.loads(_run("nft", "--json", "list", "tables"))["nftables"]
    return {
        *(f"process {pid} ({command_line(pid)})" for pid in (*processes(root), *pod_processes())),
        *(f"control group {group}" for group in pod_groups()),
        *(f"mount {point}" for point in _mount_points()),
        *(f"link {link['ifname']}" for link in json.loads(_run("ip", "-json", "link"))),
        *(f"table {entry['table']['family']} {entry['table']['name']}" for entry in tables if "table" in entry),
        *(f"{path} = {path.read_text().strip()}" for path in _SETTINGS),
        *(f"folder {path}" for path in (root, _CONTAINER_LOGS, *_ELSEWHERE) if path.exists()),
    }


def processes(root: Path) -> list[int]:
    """Process ids of a node's programs that were told of `root`, and of builds that run in a root below it."""
    found = []
    for process in psutil.process_iter(["name"]):
        ours = process.info["name"] in _NAMES and f"{root}/" in command_line(process.pid)
        if ours or _root_of(process.pid).startswith(f"{root}/"):
            found.append(process.pid)
    return found


def pod_groups() -> list[Path]:
    """The kubelet's control groups, one a hierarchy."""
    return [path for path in (_GROUPS / "kubepods", *_GROUPS.glob("*/kubepods")) if path.is_dir()]


def pod_processes(uid: str = "") -> list[int]:
    """Process ids of everything in the pod, its sandbox included; without a uid in any pod."""
    found: set[int] = set()
    for group in pod_groups():
        for file in group.rglob(f"*pod{uid}*/**/cgroup.procs"):
            with contextlib.suppress(OSError):
                found |= {int(pid) for pid in file.read_text().split()}
    return sorted(found)


def mounts(root: Path) -> list[str]:
    """Mount points below `root`, the innermost first."""
    return [point for point in reversed(_mount_points()) if point.startswith(f"{root}/")]


def _mount_points() -> list[str]:
    return [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]


def kill(pids: Iterable[int]) -> list[psutil.Process]:
    """SIGKILL to those that are still there; a container's processes go with its first one."""
    found = []
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            process.kill()
            found.append(process)
    return found


def _end(pids: Iterable[int]) -> None:
    found = kill(pids)
    deadline = time.monotonic() + 30
    while any(_runs(process) for process in found):
        if time.monotonic() > deadline:
            raise HostError(f"processes {[p.pid for p in found]} do not end on SIGKILL; see their state with ps")
        time.sleep(0.05)


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def command_line(pid: int) -> str:
    """The arguments of a process, joined; empty once it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def _root_of(pid: int) -> str:
    try:
        return str(Path(f"/proc/{pid}/root").readlink())
    except OSError:
        return ""


def _run(*command: str) -> str:
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode:
        raise HostError(f"{' '.join(command)}: {answer.stderr.strip()}")
    return answer.stdout
