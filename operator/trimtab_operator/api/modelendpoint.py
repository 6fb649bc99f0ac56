"""ModelEndpoint: a stable, long-lived OpenAI-compatible endpoint."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

from pydantic import Field

from trimtab_operator.api.base import ApiModel, Condition, Digest, ObjectName, list_map, rules
from trimtab_operator.api.pod import PodShape
from trimtab_serving.config import (
    Dtype,
    EnablePrefixCaching,
    EnforceEager,
    EngineSeed,
    GpuMemoryUtilization,
    MaxLogprobs,
    MaxModelLen,
    MaxNumBatchedTokens,
    MaxNumSeqs,
    ServedModelName,
    TensorParallelSize,
)


class EngineArgs(ApiModel):
    """The options of vLLM that an endpoint may set; what is absent is vLLM's own default."""

    tensor_parallel_size: TensorParallelSize | None = None
    gpu_memory_utilization: GpuMemoryUtilization | None = None
    max_num_seqs: MaxNumSeqs | None = None
    max_num_batched_tokens: MaxNumBatchedTokens | None = None
    enable_prefix_caching: EnablePrefixCaching | None = None
    enforce_eager: EnforceEager | None = None
    seed: EngineSeed | None = None
    max_logprobs: MaxLogprobs | None = None


class Engine(ApiModel):
    """How vLLM runs the model."""

    dtype: Dtype | None = Field(default=None, description="auto (default), float32, bfloat16 or float16.")
    max_model_len: MaxModelLen | None = None
    args: EngineArgs | None = Field(default=None, description="Options of vLLM.")


class ModelSource(ApiModel):
    """The job that made a model."""

    job_name: ObjectName = Field(description="Name of the FineTuneJob.")
    job_uid: Annotated[str, Field(max_length=64, pattern=r"^[A-Za-z0-9-]+$")] = Field(
        alias="jobUID", description="Uid of the FineTuneJob."
    )


class ServedModel(ApiModel):
    """What is served."""

    model_config = ApiModel.model_config | {
        "json_schema_extra": rules(
            (
                "self.uri.startsWith('job://') || has(self.digest)",
                "a pvc:// model needs digest: the sha256 of its manifest.json, as in the job's status",
            ),
        )
    }

    uri: Annotated[
        str,
        Field(
            min_length=6,
            max_length=1024,
            pattern=r"^(pvc://[^\s@\\]+|job://[a-z0-9]([-a-z0-9]*[a-z0-9])?/[a-z0-9]([-a-z0-9]*[a-z0-9])?)$",
            description="pvc://claim/path of an artifact, or job://name/stage: the endpoint waits for that result.",
        ),
    ]
    digest: Digest | None = Field(default=None, description="sha256 of the artifact's manifest.json.")
    source: ModelSource | None = Field(default=None, description="The job that made it.")


class ModelEndpointSpec(PodShape):
    """One model behind one address."""

    served_model_name: ServedModelName = Field()
    model: ServedModel = Field(description="What is served.")
    replicas: Annotated[int, Field(ge=0, le=1000)] = Field(default=1, description="Pods.")
    engine: Engine | None = Field(default=None, description="How vLLM runs the model.")


class EndpointPhase(StrEnum):
    """Derived from the conditions; for people, not for programs."""

    PROGRESSING = "Progressing"
    HEALTHY = "Healthy"
    DEGRADED = "Degraded"


class Revision(ApiModel):
    """A model that the endpoint serves."""

    revision: Annotated[str, Field(max_length=63)] = Field(description="Name of the revision: the start of its digest.")
    digest: Digest = Field(description="Digest of the artifact.")
    uri: Annotated[str, Field(max_length=2048)] = Field(description="Where the artifact lies.")
    source: Annotated[str, Field(max_length=1024)] | None = Field(
        default=None, description="The job:// URI that was resolved to this, once."
    )
    ready: Annotated[int, Field(ge=0)] = Field(default=0, description="Pods that answer.")


class HistoryEntry(ApiModel):
    """A revision that was served, newest first."""

    digest: Digest = Field(description="Digest of the artifact.")
    job_uid: Annotated[str, Field(max_length=64)] | None = Field(
        default=None, alias="jobUID", description="The job that made it."
    )


class ModelEndpointStatus(ApiModel):
    """What is known about the endpoint."""

    observed_generation: Annotated[int, Field(ge=0)] = Field(default=0, description="Generation this status is about.")
    phase: EndpointPhase = Field(
        default=EndpointPhase.PROGRESSING, description="For people; programs read the conditions."
    )
    reason: Annotated[str, Field(max_length=128)] = Field(default="", description="Why; the REASON column.")
    url: Annotated[str, Field(max_length=512)] | None = Field(default=None, description="Base URL of the OpenAI API.")
    replicas: Annotated[int, Field(ge=0)] = Field(
        default=0, description="Pods of the served revision; for kubectl scale."
    )
    selector: Annotated[str, Field(max_length=512)] = Field(
        default="", description="Label selector; for kubectl scale."
    )
    stable: Revision | None = Field(default=None, description="The revision that answers.")
    next: Revision | None = Field(default=None, description="The revision that is starting.")
    history: Annotated[list[HistoryEntry], Field(max_length=10)] = Field(default=[], description="Served models.")
    conditions: Annotated[list[Condition], Field(max_length=8, json_schema_extra=list_map("type"))] = Field(
        default=[], description="Ready, Progressing, Degraded."
    )


class ModelEndpoint(ApiModel):
    """A stable OpenAI-compatible endpoint for one model; revisions change behind it."""

    api_version: str
    kind: str
    metadata: dict[str, Any]
    spec: ModelEndpointSpec
    status: ModelEndpointStatus = ModelEndpointStatus()
