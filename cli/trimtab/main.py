"""The command line."""

from __future__ import annotations

import asyncio
import shlex
import sys
from collections.abc import Coroutine
from enum import StrEnum
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from trimtab.manifests.load import InvalidManifest

INVALID = 64
FAILED = 1
INTERRUPTED = 130

app = typer.Typer(
    name="trimtab",
    help="Fine-tune and serve language models from one manifest, on this machine or on Kubernetes.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
local = typer.Typer(help="Run manifests on this machine, without a cluster.", no_args_is_help=True)
app.add_typer(local, name="local")

Files = Annotated[list[Path], typer.Argument(metavar="FILE…", help="YAML files with FineTuneJobs and ModelEndpoints.")]
Folder = Annotated[
    Path, typer.Option("--workdir", help="Working folder: volumes, results, logs and what is already done.")
]
Namespace = Annotated[str, typer.Option("--namespace", "-n", help="Namespace.")]
DEFAULT_FOLDER = Path(".trimtab")


class Output(StrEnum):
    """Formats of `get`."""

    WIDE = "wide"
    JSON = "json"
    YAML = "yaml"


@app.command()
def validate(files: Files) -> None:
    """Check manifests as the API server does: YAML, unknown fields, schema and rules."""
    from trimtab.manifests.admission import checked

    try:
        documents = checked(files)
    except InvalidManifest as error:
        _refuse(error)
    for document in documents:
        print(f"{document}: {document.obj['kind']} {document.obj['metadata']['name']}: valid")


@app.command()
def version() -> None:
    """Print the version."""
    try:
        print(package_version("trimtab"))
    except PackageNotFoundError:
        print("unknown: trimtab is not installed as a package")


@local.command()
def run(
    files: Files,
    workdir: Folder = DEFAULT_FOLDER,
    json: Annotated[bool, typer.Option("--json", help="One JSON object a line on standard output.")] = False,
    exec: Annotated[
        str | None,
        typer.Option(
            "--exec",
            metavar="COMMAND",
            help="Run this, without a shell, once the jobs are done and the endpoints are ready. Their URLs are in "
            "TRIMTAB_ENDPOINTS (JSON: name to URL) and TRIMTAB_ENDPOINT_<NAME>_URL.",
        ),
    ] = None,
) -> None:
    """Run jobs to their end; what is already done is not done again.

    Stops all that it started. Exit codes: 0 done, 1 a job or the command failed, 2 usage, 64 invalid manifest,
    130 interrupted (the first Ctrl-C saves a checkpoint, a second one kills).
    """
    from trimtab.local.run import run as run_local
    from trimtab.manifests.admission import checked
    from trimtab.progress import display

    if exec is not None:
        try:
            words = shlex.split(exec)
        except ValueError as error:
            raise typer.BadParameter(f"{error}; quote it as one argument", param_hint="--exec") from error
        if not words:
            raise typer.BadParameter("empty; give a program and its arguments", param_hint="--exec")
    try:
        documents = checked(files)
    except InvalidManifest as error:
        _refuse(error)
    _finish(run_local(documents, workdir, exec, display(as_json=json)))


@local.command()
def serve(workdir: Folder = DEFAULT_FOLDER) -> None:
    """Bring the working folder's endpoints up again, until Ctrl-C."""
    from trimtab.local.run import serve as serve_local
    from trimtab.progress import display

    _finish(serve_local(workdir, display(as_json=False)))


@local.command()
def get(
    kind: Annotated[str, typer.Argument(help="ftj, mep, pods, jobs, deployments, services, configmaps, pvc, events.")],
    name: Annotated[str | None, typer.Argument(help="One object; all of the kind without it.")] = None,
    output: Annotated[Output | None, typer.Option("--output", "-o", help="Format.")] = None,
    namespace: Namespace = "default",
    workdir: Folder = DEFAULT_FOLDER,
) -> None:
    """Show objects of the working folder, also while a run is going on."""
    from trimtab.local.get import Absent, get_text

    try:
        print(get_text(workdir, kind, name, namespace, output.value if output else ""))
    except Absent as error:
        _fail(str(error), FAILED)


@local.command()
def logs(
    pod: Annotated[
        str, typer.Argument(help="Name of a pod; or of a FineTuneJob, ModelEndpoint, Job or Deployment: its newest.")
    ],
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the pod ends.")] = False,
    namespace: Namespace = "default",
    workdir: Folder = DEFAULT_FOLDER,
) -> None:
    """Print what a pod's container wrote."""
    from trimtab.local.get import Absent, log_lines

    try:
        for text in log_lines(workdir, pod, namespace, follow=follow):
            print(text, end="", flush=True)
    except Absent as error:
        _fail(str(error), FAILED)


def _finish(work: Coroutine[Any, Any, int]) -> NoReturn:
    """Run to the end and exit with its code."""
    from trimtab.local.workdir import LocalError

    try:
        code = asyncio.run(work)
    except InvalidManifest as error:
        _refuse(error)
    except LocalError as error:
        _fail(str(error), FAILED)
    except BaseExceptionGroup as group:
        said, rest = group.split(LocalError)
        if said is None or rest is not None:
            raise
        _fail("\n".join(str(error) for error in _leaves(said)), FAILED)
    raise SystemExit(code)


def _leaves(group: BaseExceptionGroup[Any]) -> list[BaseException]:
    return [
        leaf
        for error in group.exceptions
        for leaf in (_leaves(error) if isinstance(error, BaseExceptionGroup) else [error])
    ]


def _refuse(error: InvalidManifest) -> NoReturn:
    _fail("\n".join(error.faults), INVALID)


def _fail(text: str, code: int) -> NoReturn:
    for line in text.splitlines():
        print(f"error: {line}", file=sys.stderr)
    raise SystemExit(code)


def main() -> None:
    """Entry point of `trimtab` and `kubectl trimtab`."""
    try:
        app()
    except KeyboardInterrupt:  # before or after a run: in it, the first Ctrl-C is an orderly stop
        raise SystemExit(INTERRUPTED) from None
