"""What vLLM is started with: read back with vLLM's own parser, so that an option it does not know fails here."""

from pathlib import Path
from typing import Any

import pytest
from tests.serving.configs import DIGEST, config_document

from trimtab_serving import command
from trimtab_serving.config import ServeConfig
from trimtab_trainer.errors import BadConfiguration

MODEL = Path("/models/assistant")


def parse(*, cpu: bool, **changes: Any) -> Any:
    """The arguments of a configuration as vLLM understands them."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    config = ServeConfig.model_validate(config_document(**changes))
    parser = make_arg_parser(FlexibleArgumentParser())
    return parser.parse_args(command.arguments(config, MODEL, "10.0.0.7", cpu=cpu))


def test_what_always_holds() -> None:
    args = parse(cpu=False, port=8123, shutdownSeconds=45)
    assert (args.model, args.served_model_name) == (str(MODEL), ["assistant"])
    assert (args.host, args.port, args.shutdown_timeout) == ("10.0.0.7", 8123, 45)
    assert args.middleware == ["trimtab_serving.middleware.AllowedPaths"]
    assert args.disable_fastapi_docs
    assert not args.trust_remote_code
    assert args.load_format == "safetensors"
    assert args.generation_config == "auto"
    assert (args.fingerprint_mode, args.fingerprint_value) == ("custom", DIGEST)


def test_every_engine_option_reaches_vllm() -> None:
    options = {
        "tensorParallelSize": 2,
        "gpuMemoryUtilization": 0.5,
        "maxNumSeqs": 7,
        "maxNumBatchedTokens": 4096,
        "enablePrefixCaching": False,
        "enforceEager": True,
        "seed": 3,
        "maxLogprobs": 5,
    }
    args = parse(cpu=False, engine={"dtype": "bfloat16", "maxModelLen": 64, "args": options}, cacheBytes=2**21)
    found = (
        args.tensor_parallel_size,
        args.gpu_memory_utilization,
        args.max_num_seqs,
        args.max_num_batched_tokens,
        args.enable_prefix_caching,
        args.enforce_eager,
        args.seed,
        args.max_logprobs,
    )
    assert found == tuple(options.values())
    assert (args.dtype, args.max_model_len, args.kv_cache_memory_bytes) == ("bfloat16", 64, 2**21)


def test_a_cpu_gets_what_it_can_run() -> None:
    cpu, gpu = parse(cpu=True), parse(cpu=False)
    assert (cpu.dtype, gpu.dtype) == ("float32", "auto")
    assert (cpu.kv_cache_memory_bytes, gpu.kv_cache_memory_bytes) == (command.CPU_CACHE_BYTES, None)
    assert (cpu.enforce_eager, gpu.enforce_eager) == (True, False)
    assert parse(cpu=True, engine={"dtype": "bfloat16"}).dtype == "bfloat16"
    with pytest.raises(BadConfiguration, match="tensorParallelSize"):
        parse(cpu=True, engine={"args": {"tensorParallelSize": 2}})


def test_the_environment_keeps_the_key_and_loses_the_switches() -> None:
    inherited = {
        "PATH": "/bin",
        "VLLM_API_KEY": "secret",
        "HF_HUB_OFFLINE": "0",
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_CPU_KVCACHE_SPACE": "40",
        "VLLM_PORT": "tcp://10.0.0.1:8000",
    }
    kept = {"PATH": "/bin", "VLLM_API_KEY": "secret"}
    always = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_DO_NOT_TRACK": "1"}
    assert command.environment(inherited, cpu=False) == kept | always
    on_cpu = command.environment(inherited, cpu=True)
    assert on_cpu.items() > (kept | always).items()
    assert on_cpu["TORCH_COMPILE_DISABLE"] == "1"


@pytest.mark.parametrize(
    ("installed", "cpu"),
    [({"vllm-cpu": "0.32.0"}, True), ({"vllm": "0.32.0+cpu"}, True), ({"vllm": "0.32.0"}, False)],
)
def test_the_build_decides(monkeypatch: pytest.MonkeyPatch, installed: dict[str, str], cpu: bool) -> None:
    monkeypatch.setattr(command, "version", lambda name: _version(installed, name))
    assert command.runs_on_cpu() is cpu


def test_no_vllm_is_said_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "version", lambda name: _version({}, name))
    with pytest.raises(BadConfiguration, match="serving-cpu"):
        command.runs_on_cpu()


def _version(installed: dict[str, str], name: str) -> str:
    if name not in installed:
        raise command.PackageNotFoundError(name)
    return installed[name]
