"""Finds or builds the programs of the tests: Kubernetes and etcd, KWOK, what a node runs, what checks a chart.

- `binaries()`: Kubernetes' components, etcd, kubectl and KWOK. `$KUBEBUILDER_ASSETS` wins; `$KUBERNETES` names another
  version, of those below `versions/`.
- `node_tools()`: containerd, runc, CNI plugins and CoreDNS, for the cluster tier.
- `chart_tools()`: helm (4), helm3 (3) and kubeconform.

Each is built once into `${TRIMTAB_CACHE:-${XDG_CACHE_HOME:-~/.cache}/trimtab}/kubernetes/<digest of the Go module>/`:
minutes, 1 GB of modules and 3 GB of Go's own build cache. `python tests/kubernetes/build.py [binaries|node|chart]` does
the same and prints the directory, so that a test run later starts at once. Only the standard library is used.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":  # run as a file, before any environment is set up
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.kubernetes.toolchain import BuildError, Say, cache_directory, compile_go, lock, toolchain

__all__ = ["BuildError", "binaries", "cache_directory", "chart_tools", "node_tools"]

MODULE = Path(__file__).resolve().parent
COMPONENTS = (
    "etcd",
    "kube-apiserver",
    "kube-controller-manager",
    "kube-scheduler",
    "kube-proxy",
    "kubelet",
    "kubectl",
)
"""The names that `main.go` answers to."""
VERSION_VARIABLE = "KUBERNETES"
_REACH = "make the Go module proxy ($GOPROXY) reachable and 5 GB of disk free"


@dataclass(frozen=True)
class Program:
    """One program of a Go module."""

    package: str
    name: str
    """Of the file that is built."""
    tags: str = ""
    cgo: bool = False
    """Without it neither a C compiler nor the host's libc decides what comes out."""
    stamps: str = ""
    """Linker flags that set the version that the program tells."""
    modfile: str = "go.mod"
    links: tuple[str, ...] = ()
    """Names beside its own by which it is called."""


@dataclass(frozen=True)
class Collection:
    """Programs that are built together into one directory of the cache."""

    directory: Path
    sources: tuple[str, ...]
    """Files below `directory` that determine what comes out."""
    programs: tuple[Program, ...]
    remedy: str

    def digest(self) -> str:
        """First 16 hex digits of the sha256 of the sources."""
        content = hashlib.sha256()
        for name in self.sources:
            file = (self.directory / name).read_bytes()
            content.update(f"{name} {len(file)}\n".encode() + file)
        return content.hexdigest()[:16]

    def provide(self, say: Say) -> Path:
        """The directory with the programs, built where it is not there yet."""
        target = cache_directory() / "kubernetes" / self.digest()
        if not target.is_dir():
            target.parent.mkdir(parents=True, exist_ok=True)
            with lock(target.parent / "lock", say):
                if not target.is_dir():
                    self._build(target, say)
        return target

    def _build(self, target: Path, say: Say) -> None:
        """Compiles into a temporary directory beside `target` and renames it, so that `target` is never half there."""
        go = toolchain(_required(self.directory / "go.mod", r"^go ([\d.]+)$"), say)
        names = ", ".join(program.name for program in self.programs)
        say(f"kubernetes: building {names} into {target}; minutes when Go's cache is cold")
        with tempfile.TemporaryDirectory(prefix="build-", dir=target.parent) as directory:
            output = Path(directory, "bin")
            output.mkdir()
            for program in self.programs:
                flags = ["-v", "-trimpath", "-buildvcs=false", f"-modfile={program.modfile}"]
                flags += [f"-ldflags=-s -w {program.stamps}", *([f"-tags={program.tags}"] if program.tags else [])]
                environment = {"CGO_ENABLED": str(int(program.cgo))}
                command = [str(go), "build", *flags, "-o", str(output / program.name), program.package]
                compile_go(command, self.directory, environment, self.remedy, say)
                for link in program.links:
                    (output / link).symlink_to(program.name)
            output.rename(target)
        say(f"kubernetes: built {target}")


def binaries(say: Say = print) -> Path:
    """The directory with `COMPONENTS` and `kwok`; `say` takes the progress lines of a build.

    Raises:
        BuildError: `$KUBEBUILDER_ASSETS` is incomplete, `$KUBERNETES` is not known, or the build fails.
    """
    assets = os.environ.get("KUBEBUILDER_ASSETS")
    if not assets:
        return _kubernetes(os.environ.get(VERSION_VARIABLE) or versions()[0]).provide(say)
    missing = [name for name in (*COMPONENTS, "kwok") if not os.access(Path(assets, name), os.X_OK)]
    if missing:
        raise BuildError(
            f"$KUBEBUILDER_ASSETS ({assets}) lacks {', '.join(missing)}: add them, or unset the variable and the "
            "binaries are built"
        )
    return Path(assets)


def node_tools(say: Say = print) -> Path:
    """The directory with what a node runs beside the kubelet; runc needs a C compiler, pkg-config and libseccomp."""
    containerd, plugins = "github.com/containerd/containerd/v2/cmd", "github.com/containernetworking/plugins/plugins"
    return Collection(
        MODULE / "node_tools",
        ("go.mod", "go.sum"),
        (
            Program(f"{containerd}/containerd", "containerd"),
            Program(f"{containerd}/containerd-shim-runc-v2", "containerd-shim-runc-v2"),
            Program(f"{containerd}/ctr", "ctr"),
            # Without seccomp every pod with a profile fails, and so every restricted pod.
            Program("github.com/opencontainers/runc", "runc", tags="seccomp", cgo=True),
            Program("github.com/coredns/coredns", "coredns"),
            Program(f"{plugins}/main/bridge", "bridge"),
            Program(f"{plugins}/main/loopback", "loopback"),
            Program(f"{plugins}/ipam/host-local", "host-local"),
        ),
        f"{_REACH}; for runc, on Debian: apt-get install gcc pkg-config libseccomp-dev",
    ).provide(say)


def chart_tools(say: Say = print) -> Path:
    """The directory with `helm` (4), `helm3` and `kubeconform`."""
    return Collection(
        MODULE / "chart_tools",
        ("go.mod", "go.sum"),
        (
            Program("helm.sh/helm/v4/cmd/helm", "helm"),
            Program("helm.sh/helm/v3/cmd/helm", "helm3"),
            Program("github.com/yannh/kubeconform/cmd/kubeconform", "kubeconform"),
        ),
        _REACH,
    ).provide(say)


def versions() -> list[str]:
    """Kubernetes' versions that can be built, e.g. `v1.36.3`; the default first."""
    default = "v" + ".".join(map(str, _required(MODULE / "go.mod", r"^\s*k8s\.io/kubernetes v([\d.]+)$")))
    return [default, *sorted(file.stem for file in (MODULE / "versions").glob("*.mod"))]


def _kubernetes(version: str) -> Collection:
    if version not in versions():
        raise BuildError(f"${VERSION_VARIABLE} is {version!r}: choose one of {', '.join(versions())}")
    modfile = "go.mod" if version == versions()[0] else f"versions/{version}.mod"
    major, minor, _patch = version.removeprefix("v").split(".")
    told = {"gitVersion": version, "gitMajor": major, "gitMinor": minor}
    stamps = " ".join(f"-X k8s.io/component-base/version.{name}={value}" for name, value in told.items())
    modfiles = dict.fromkeys((modfile, "go.mod"))  # KWOK is the same for all versions
    return Collection(
        MODULE,
        (*(name for file in modfiles for name in (file, f"{file.removesuffix('.mod')}.sum")), "main.go"),
        (
            Program(".", "kubernetes", stamps=stamps, modfile=modfile, links=COMPONENTS),
            Program("sigs.k8s.io/kwok/cmd/kwok", "kwok"),
        ),
        f"{_REACH}, or let $KUBEBUILDER_ASSETS name a directory with the binaries",
    )


def _required(file: Path, pattern: str) -> tuple[int, ...]:
    """The version that a line of a `go.mod` asks for; `pattern` has one group, for its digits and dots."""
    found = re.search(pattern, file.read_text(), re.MULTILINE)
    if found is None:
        raise BuildError(f"{file}: no line matches {pattern!r}: restore the file")
    return tuple(int(part) for part in found[1].split("."))


if __name__ == "__main__":
    wanted = {"binaries": binaries, "node": node_tools, "chart": chart_tools}
    names = sys.argv[1:] or ["binaries"]
    if unknown := set(names) - set(wanted):
        sys.exit(f"usage: build.py [{'|'.join(wanted)}]...; not known: {', '.join(sorted(unknown))}")
    try:
        for name in names:
            print(wanted[name](lambda line: print(line, file=sys.stderr, flush=True)))
    except BuildError as error:
        sys.exit(f"error: {error}")
