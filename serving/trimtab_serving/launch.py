"""From the configuration to a running vLLM: verify, then replace this process, so that signals reach vLLM itself."""

from __future__ import annotations

import errno
import ipaddress
import os
import signal
import socket
import sys
from pathlib import Path
from typing import NoReturn

from pydantic import ValidationError

from trimtab_serving.artifact import require_cpu_support, verified_model
from trimtab_serving.command import arguments, environment, runs_on_cpu
from trimtab_serving.config import ServeConfig
from trimtab_trainer.config import LISTEN_ADDRESS_VARIABLE
from trimtab_trainer.errors import BadConfiguration, StageError, StorageError
from trimtab_trainer.report import failure_report, write_report

ENTRY_POINT = "vllm.entrypoints.openai.api_server"
"""Unlike the `vllm` command, it does not ask for a package called vllm, which the CPU build is not."""

DEFAULT_ADDRESS = "0.0.0.0"  # noqa: S104 - a pod is reached on its own address; TRIMTAB_LISTEN_ADDRESS narrows it


def main(argv: list[str]) -> int:
    """Serve the configuration that `argv[0]` names. Returns an exit code on failure only, after reporting it."""
    if len(argv) != 1:
        print("usage: python -m trimtab_serving FILE", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, _stop)
    try:
        serve(read_config(Path(argv[0])))
    except StageError as error:
        print(f"{error.reason}: {error.message}", file=sys.stderr)
        write_report(failure_report(error))
        return error.exit_code


def serve(config: ServeConfig) -> NoReturn:
    """Check address, artifact and options, then become vLLM."""
    cpu = runs_on_cpu()
    host = listen_address()
    require_free(host, config.port)
    try:
        model = verified_model(config)
        if cpu:
            require_cpu_support(model)
    except OSError as error:
        raise StorageError(f"{config.model.uri}: {error}; check the volume") from error
    command = [sys.executable, "-m", ENTRY_POINT, *arguments(config, model, host, cpu=cpu)]
    whose = f"{config.endpoint.namespace}/{config.endpoint.name} revision {config.revision}"
    print(
        f"{whose}: all digests of {config.model.uri} match; starting vLLM on {host} port {config.port}",
        file=sys.stderr,
        flush=True,
    )
    os.execve(sys.executable, command, environment(os.environ, cpu=cpu))  # noqa: S606 - no shell is the point


def read_config(path: Path) -> ServeConfig:
    """Parse a configuration file; `BadConfiguration` names the field."""
    try:
        return ServeConfig.model_validate_json(path.read_bytes())
    except OSError as error:
        raise BadConfiguration(f"{path}: {error.strerror or error}") from error
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"]) or "the file"
        raise BadConfiguration(f"{path}: {place}: {first['msg']} ({error.error_count()} errors)") from error


def listen_address() -> str:
    """The IP address to serve on, from `TRIMTAB_LISTEN_ADDRESS`; all addresses where that is absent."""
    address = os.environ.get(LISTEN_ADDRESS_VARIABLE) or DEFAULT_ADDRESS
    try:
        return str(ipaddress.ip_address(address))
    except ValueError as error:
        raise BadConfiguration(f"{LISTEN_ADDRESS_VARIABLE}: {address!r} is not an IP address") from error


def require_free(host: str, port: int) -> None:
    """Refuse an address that can't be listened on now, before minutes go into verifying and loading."""
    family = socket.AF_INET6 if ipaddress.ip_address(host).version == 6 else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            remedy = (
                "stop the process that holds it, or choose another port"
                if error.errno == errno.EADDRINUSE
                else f"check {LISTEN_ADDRESS_VARIABLE} and the port"
            )
            raise BadConfiguration(
                f"can't listen on {host} port {port}: {error.strerror}; {remedy}", reason="AddressUnavailable"
            ) from error


def _stop(signum: int, _frame: object) -> NoReturn:
    # Process 1 of a container has no default action for SIGTERM; exec gives the signal back to vLLM.
    raise SystemExit(128 + signum)
