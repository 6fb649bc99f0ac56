"""What the launcher refuses, through the real entry point: nothing is served, and one message says why."""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.serving.artifact import make_artifact
from tests.serving.configs import config_document
from tests.serving.server import own_address

from trimtab_serving.artifact import CPU_HEAD_SIZES
from trimtab_trainer import manifest
from trimtab_trainer.config import REPORT, ExitCode, FailureReport

Launch = Callable[..., tuple[int, FailureReport]]


@pytest.fixture(scope="module")
def sealed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("artifact") / "model"
    make_artifact(folder)
    return folder


@pytest.fixture
def model(sealed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sealed, tmp_path / "models" / "model"))


@pytest.fixture
def launch(model: Path, tmp_path: Path) -> Launch:
    """Run the launcher, on what is a good configuration but for the changes; returns exit code and report."""

    def run(address: str | None = None, digest: str | None = None, **changes: Any) -> tuple[int, FailureReport]:
        source = {"uri": "pvc://models/model", "digest": digest or manifest.manifest_digest(model)}
        config = tmp_path / "config.json"
        config.write_text(json.dumps(config_document(**{"model": source, **changes})))
        report = tmp_path / "termination-log"
        environment = os.environ | {
            "TRIMTAB_VOLUMES": json.dumps({"models": str(model.parent)}),
            "TRIMTAB_TERMINATION_LOG": str(report),
            "TRIMTAB_LISTEN_ADDRESS": address or own_address(),
        }
        command = [sys.executable, "-m", "trimtab_serving", str(config)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
        failure = REPORT.validate_json(report.read_text())
        assert isinstance(failure, FailureReport)
        assert failure.message in done.stderr
        assert "Traceback" not in done.stderr
        assert "starting vLLM" not in done.stderr
        return done.returncode, failure

    return run


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "chat_template.jinja", "config.json"])
def test_one_changed_byte_is_never_served(launch: Launch, model: Path, name: str) -> None:
    content = bytearray((model / name).read_bytes())
    content[len(content) // 2] ^= 1
    (model / name).write_bytes(content)
    code, failure = launch()
    assert (code, failure.reason) == (ExitCode.INPUT_MISSING, "CorruptArtifact")
    assert str(model / name) in failure.message


def test_another_manifest_than_the_pinned_one(launch: Launch, model: Path) -> None:
    pinned = manifest.manifest_digest(model)
    (model / "README.md").write_text("Rewritten, and sealed again.")
    manifest.seal(model, "model", {})
    code, failure = launch(digest=pinned)
    assert (code, failure.reason) == (ExitCode.INPUT_MISSING, "CorruptArtifact")
    assert pinned in failure.message


def test_a_file_beside_the_manifest(launch: Launch, model: Path) -> None:
    (model / "added.json").write_text("{}")
    code, failure = launch()
    assert (code, failure.reason) == (ExitCode.INPUT_MISSING, "CorruptArtifact")
    assert "added.json" in failure.message


@pytest.mark.parametrize("name", ["pytorch_model.bin", "modeling.py", "weights.pt", "state.pkl", "nested/hook.so"])
def test_a_sealed_file_that_can_hold_code(launch: Launch, model: Path, name: str) -> None:
    (model / name).parent.mkdir(exist_ok=True)
    (model / name).write_bytes(b"code")
    manifest.seal(model, "model", {})
    code, failure = launch()
    assert (code, failure.reason) == (ExitCode.INPUT_MISSING, "UnsafeInput")
    assert name in failure.message


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_a_sealed_configuration_that_asks_for_code(launch: Launch, model: Path, name: str) -> None:
    content = json.loads((model / name).read_text())
    (model / name).write_text(json.dumps({**content, "auto_map": {"AutoModelForCausalLM": "modeling.Evil"}}))
    manifest.seal(model, "model", {})
    code, failure = launch()
    assert (code, failure.reason) == (ExitCode.INPUT_MISSING, "UnsafeInput")
    assert "auto_map" in failure.message
    assert name in failure.message


def test_a_sealed_folder_that_is_no_model(launch: Launch, model: Path) -> None:
    manifest.seal(model, "prepared", {})
    code, failure = launch()
    assert code == ExitCode.INPUT_MISSING
    assert "'prepared'" in failure.message


def test_no_folder_and_no_claim(launch: Launch) -> None:
    for uri in ("pvc://models/elsewhere", "pvc://other/model"):
        code, failure = launch(model={"uri": uri, "digest": "sha256:" + "0" * 64})
        assert (code, failure.reason) == (ExitCode.INPUT_MISSING, "InputMissing")
        assert uri in failure.message


def test_a_port_in_use(launch: Launch) -> None:
    with socket.socket() as holder:
        holder.bind((own_address(), 0))
        holder.listen()
        port = holder.getsockname()[1]
        code, failure = launch(port=port)
    assert (code, failure.reason) == (ExitCode.BAD_CONFIGURATION, "AddressUnavailable")
    assert f"{own_address()} port {port}: Address already in use; stop the process" in failure.message


@pytest.mark.parametrize("address", ["not-an-address", "192.0.2.1"])
def test_an_address_that_is_not_ours(launch: Launch, address: str) -> None:
    code, failure = launch(address=address)
    assert code == ExitCode.BAD_CONFIGURATION
    assert address in failure.message


def test_a_wrong_configuration_names_the_field(launch: Launch) -> None:
    code, failure = launch(engine={"args": {"trustRemoteCode": True}})
    assert (code, failure.reason) == (ExitCode.BAD_CONFIGURATION, "BadConfiguration")
    assert "engine.args.trustRemoteCode" in failure.message


def test_heads_that_a_cpu_can_not_run(launch: Launch, model: Path) -> None:
    content = json.loads((model / "config.json").read_text())
    content.pop("head_dim", None)
    (model / "config.json").write_text(json.dumps({**content, "hidden_size": 192, "num_attention_heads": 4}))
    manifest.seal(model, "model", {})
    code, failure = launch()
    assert (code, failure.reason) == (ExitCode.BAD_CONFIGURATION, "BadConfiguration")
    assert "attention heads of size 48; vLLM on a CPU takes 32, 64" in failure.message


def test_the_sizes_are_those_of_the_installed_vllm() -> None:
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    assert list(CPU_HEAD_SIZES) == CPUAttentionBackend.get_supported_head_sizes()
