"""A real server of a tiny artifact, started as a pod starts it: launcher, probe, SIGTERM."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.serving.artifact import make_artifact
from tests.serving.configs import config_document

MODEL = "tiny"
PORT = 8000
START_SECONDS = 300


@dataclass
class Server:
    """A running server. `model` is the artifact's folder, `log` what the process wrote."""

    process: subprocess.Popen[bytes]
    url: str
    model: Path
    digest: str
    log: Path

    def terminate(self) -> int:
        """Send SIGTERM and wait; returns the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=90)


def own_address() -> str:
    """A loopback address of this process; with it any fixed port is free, whoever else runs on the machine."""
    pid = os.getpid()
    return f"127.{64 + (pid >> 16) % 64}.{pid >> 8 & 255}.{pid & 255}"


@contextmanager
def running(folder: Path) -> Iterator[Server]:
    """Seal an artifact below `folder`, serve it, and hand it out when the startup probe is content."""
    model = folder / "models" / "tiny"
    digest = make_artifact(model)
    address = own_address()
    source = {"uri": "pvc://models/tiny", "digest": digest}
    config = folder / "serve.json"
    config.write_text(json.dumps(config_document(servedModelName=MODEL, model=source, port=PORT)))
    environment = os.environ | {
        "TRIMTAB_VOLUMES": json.dumps({"models": str(model.parent)}),
        "TRIMTAB_LISTEN_ADDRESS": address,
        "OMP_NUM_THREADS": "2",
        "VLLM_SERVER_DEV_MODE": "1",
    }
    log = folder / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "trimtab_serving", str(config)],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        _wait_until_probed(process, config, environment, log)
        yield Server(process, f"http://{address}:{PORT}", model, digest, log)
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _wait_until_probed(process: subprocess.Popen[bytes], config: Path, environment: dict[str, str], log: Path) -> None:
    command = [sys.executable, "-m", "trimtab_serving.probe", str(config)]
    deadline = time.monotonic() + START_SECONDS
    while subprocess.run(command, env=environment, capture_output=True, check=False).returncode != 0:
        if process.poll() is not None or time.monotonic() > deadline:
            raise AssertionError(f"no answer, exit code {process.poll()}; the log ends:\n{log.read_text()[-4000:]}")
        time.sleep(1)
