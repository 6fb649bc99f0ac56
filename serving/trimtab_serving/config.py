"""The contract between the operator and a serving pod: one JSON file in.

The operator builds `ServeConfig` and writes it as JSON; `python -m trimtab_serving FILE` and
`python -m trimtab_serving.probe FILE` parse it. Imports neither torch nor vLLM: the operator imports this module.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Final, Literal

from pydantic import Field

from trimtab_trainer.config import Artifact
from trimtab_trainer.settings import Contract

CONTRACT_VERSION: Final = 1
DEFAULT_PORT = 8000


class Dtype(StrEnum):
    """Number format of weights and activations. `auto`: as the artifact declares; float32 where there is no GPU."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


ServedModelName = Annotated[
    str,
    Field(
        min_length=1,
        max_length=128,
        pattern=r"^[A-Za-z0-9]([A-Za-z0-9._:/-]*[A-Za-z0-9])?$",
        description="Name of the model in requests and replies.",
    ),
]
MaxModelLen = Annotated[
    int,
    Field(ge=8, le=16_777_216, description="Longest prompt and answer together, in tokens; absent: the model's own."),
]
TensorParallelSize = Annotated[int, Field(ge=1, le=64, description="GPUs over which each layer is split.")]
GpuMemoryUtilization = Annotated[
    float, Field(ge=0.05, le=0.99, description="Part of a GPU's memory that vLLM may use; without effect on a CPU.")
]
MaxNumSeqs = Annotated[int, Field(ge=1, le=65_536, description="Requests that are decoded at the same time.")]
MaxNumBatchedTokens = Annotated[
    int, Field(ge=8, le=16_777_216, description="Tokens that one step of the engine processes over all requests.")
]
EnablePrefixCaching = Annotated[bool, Field(description="Reuse the cache of equal beginnings of prompts.")]
EnforceEager = Annotated[
    bool, Field(description="Do not capture CUDA graphs: starts sooner, answers later; always so on a CPU.")
]
EngineSeed = Annotated[int, Field(ge=0, le=2**31 - 1, description="Seed of sampling for requests that carry none.")]
MaxLogprobs = Annotated[
    int, Field(ge=0, le=1000, description="Most log-probabilities a token that a request may ask for.")
]


class EngineArgs(Contract):
    """The options of vLLM that an endpoint may set; an absent one is left to vLLM, any other is refused."""

    tensor_parallel_size: TensorParallelSize | None = None
    gpu_memory_utilization: GpuMemoryUtilization | None = None
    max_num_seqs: MaxNumSeqs | None = None
    max_num_batched_tokens: MaxNumBatchedTokens | None = None
    enable_prefix_caching: EnablePrefixCaching | None = None
    enforce_eager: EnforceEager | None = None
    seed: EngineSeed | None = None
    max_logprobs: MaxLogprobs | None = None


class Engine(Contract):
    """How vLLM runs the model."""

    dtype: Dtype = Dtype.AUTO
    max_model_len: MaxModelLen | None = None
    args: EngineArgs = EngineArgs()


class EndpointIdentity(Contract):
    """Whose pod this is."""

    namespace: str
    name: str


class ServeConfig(Contract):
    """Serve one revision of an endpoint: one model artifact, one vLLM."""

    contract_version: Literal[1] = CONTRACT_VERSION
    kind: Literal["serve"] = "serve"
    endpoint: EndpointIdentity
    revision: str
    served_model_name: ServedModelName
    model: Artifact
    engine: Engine = Engine()
    port: Annotated[int, Field(ge=1, le=65_535)] = DEFAULT_PORT
    cache_bytes: Annotated[int, Field(ge=2**20)] | None = None
    """Key-value cache in bytes; absent: vLLM's choice on a GPU, 1 GiB on a CPU."""
    shutdown_seconds: Annotated[int, Field(ge=0, le=3600)] = 30
    """After SIGTERM running answers may take so long to end; the pod's grace period must be longer
    (preStop sleep + this + 15)."""
