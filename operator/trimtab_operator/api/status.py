"""The status of a FineTuneJob: a published contract, written by the operator only."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import Field

from trimtab_operator.api.base import ApiModel, Condition, Digest, Quantity, StageName, Timestamp, list_map

Count = Annotated[int, Field(ge=0, le=2**53)]
Reason = Annotated[str, Field(max_length=128)]
Uid = Annotated[str, Field(max_length=64)]
ResolvedUri = Annotated[str, Field(max_length=2048)]


class JobPhase(StrEnum):
    """Derived from the conditions and stages; for people, not for programs."""

    PENDING = "Pending"
    PREPARING = "Preparing"
    QUEUED = "Queued"
    RUNNING = "Running"
    SUSPENDED = "Suspended"
    SUCCEEDED = "Succeeded"
    FAILED = "Failed"


class StagePhase(StrEnum):
    """Where one stage is."""

    PENDING = "Pending"
    PREPARING = "Preparing"
    QUEUED = "Queued"
    RUNNING = "Running"
    SUSPENDED = "Suspended"
    SUCCEEDED = "Succeeded"
    FAILED = "Failed"


class Failure(ApiModel):
    """How an attempt ended badly."""

    attempt: Count = Field(description="Number of the attempt.")
    exit_code: int | None = Field(default=None, description="Exit code of the container; absent where none ran.")
    reason: Reason = Field(description="Cause in one word, e.g. OOMKilled.")
    message: Annotated[str, Field(max_length=1024)] = Field(default="", description="Cause, place and remedy.")
    node: Annotated[str, Field(max_length=253)] | None = Field(default=None, description="Node of the failing pod.")


class Failures(ApiModel):
    """Attempts that ended badly; preemption does not count."""

    count: Count = Field(default=0, description="How many attempts failed.")
    last: Failure | None = Field(default=None, description="The newest failure.")


class Prepared(ApiModel):
    """What prepare found out about the stage's data."""

    digest: Digest = Field(description="Digest of the prepared data.")
    records: Count = Field(description="Records of one epoch, after mixing and drops.")
    dropped: Count = Field(default=0, description="Records left out.")
    truncated: Count = Field(default=0, description="Records cut to maxLength.")
    tokens: Count = Field(description="Tokens of one epoch after mixing and truncation; padding excluded.")


class Estimate(ApiModel):
    """What the stage will need; written before an accelerator is claimed."""

    steps: Count = Field(description="Optimiser steps.")
    accelerator_memory: Quantity = Field(description="Memory of one process.")
    seconds: Count = Field(description="Training time.")
    tokens_per_second: Count | None = Field(default=None, description="The speed that `seconds` assumes.")


class MetricValue(ApiModel):
    """A named value; a decimal string, since a status holds no floats."""

    name: Annotated[str, Field(max_length=64)] = Field(description="Name of the metric.")
    value: Annotated[str, Field(max_length=64)] = Field(description="Decimal string.")


class StageProgress(ApiModel):
    """How far a running stage is."""

    step: Count = Field(description="Optimiser steps done.")
    total_steps: Count = Field(description="Optimiser steps in all.")
    epoch: Annotated[str, Field(max_length=32)] | None = Field(
        default=None, description="Passes over the data, e.g. 1.25."
    )
    tokens_per_second: Count | None = Field(default=None, description="Training speed over all processes.")
    metrics: Annotated[list[MetricValue], Field(max_length=32, json_schema_extra=list_map("name"))] = Field(
        default=[], description="Loss and other values."
    )


class CheckpointStatus(ApiModel):
    """A checkpoint of the stage."""

    step: Count = Field(description="Step after which it was saved.")
    digest: Digest = Field(description="Digest of its manifest.")


class ArtifactStatus(ApiModel):
    """A finished, write-once result."""

    uri: ResolvedUri = Field(description="Where it lies.")
    digest: Digest = Field(description="sha256 of its manifest.json.")


class StageStatus(ApiModel):
    """One stage."""

    name: StageName = Field(description="The stage's name.")
    phase: StagePhase = Field(default=StagePhase.PENDING, description="Where the stage is.")
    attempt: Count = Field(default=0, description="Number of the newest attempt; written before its Job is created.")
    job_uid: Uid | None = Field(default=None, alias="jobUID", description="Job of the newest attempt, once it exists.")
    failures: Failures | None = Field(default=None, description="Attempts that ended badly.")
    start_time: Timestamp | None = Field(default=None, description="When the first attempt started.")
    completion_time: Timestamp | None = Field(default=None, description="When the stage ended.")
    prepared: Prepared | None = Field(default=None, description="What prepare found out about the data.")
    estimate: Estimate | None = Field(default=None, description="What the stage will need.")
    progress: StageProgress | None = Field(default=None, description="How far the stage is.")
    checkpoints: Annotated[list[CheckpointStatus], Field(max_length=10)] = Field(
        default=[], description="Newest checkpoints, as far as reported."
    )
    artifact: ArtifactStatus | None = Field(default=None, description="The stage's result.")
    message: Annotated[str, Field(max_length=1024)] = Field(default="", description="What is going on, for a person.")


class PrepareStatus(ApiModel):
    """The prepare Job."""

    attempt: Count = Field(default=0, description="Number of the newest attempt.")
    job_uid: Uid | None = Field(default=None, alias="jobUID", description="Job of the newest attempt, once it exists.")
    failures: Failures | None = Field(default=None, description="Attempts that ended badly.")


class Images(ApiModel):
    """Images pinned at acceptance; an upgrade of the operator leaves a running job alone."""

    trainer: Annotated[str, Field(max_length=512)] = Field(description="Image of prepare and training pods.")
    contract_version: Count = Field(description="Version of the stage contract that the image speaks.")


class JobProgress(ApiModel):
    """Progress of the whole job."""

    stage: StageName | None = Field(default=None, description="Stage that runs now.")
    percent: Annotated[int, Field(ge=0, le=100)] = Field(
        default=0, description="Part of the stages' steps that is done."
    )
    estimated_remaining_seconds: Count | None = Field(
        default=None, description="Time to the end of the running stage, validation, checkpoints and result included."
    )
    guessed_at_tokens_per_second: Count | None = Field(
        default=None,
        description="While the time is a guess, before 20 steps are measured: the speed that it assumes.",
    )


class EndpointStatus(ApiModel):
    """The endpoint that serves the result."""

    name: Annotated[str, Field(max_length=63)] = Field(description="Name of the ModelEndpoint.")
    url: Annotated[str, Field(max_length=512)] | None = Field(default=None, description="Base URL of its OpenAI API.")


class FineTuneJobStatus(ApiModel):
    """What is known about the job."""

    observed_generation: Count = Field(default=0, description="Generation of the spec that this status is about.")
    phase: JobPhase = Field(default=JobPhase.PENDING, description="For people; programs read the conditions.")
    reason: Reason = Field(default="", description="Why the job is in this phase; the REASON column.")
    progress_text: Annotated[str, Field(max_length=32)] = Field(default="", description="The PROGRESS column.")
    remaining_text: Annotated[str, Field(max_length=32)] = Field(
        default="", description="The ETA column; ~ before a guess."
    )
    conditions: Annotated[list[Condition], Field(max_length=16, json_schema_extra=list_map("type"))] = Field(
        default=[], description="Accepted, Prepared, Progressing, Suspended, RolledOut, Complete, Failed."
    )
    start_time: Timestamp | None = Field(default=None, description="When the operator accepted the job.")
    completion_time: Timestamp | None = Field(default=None, description="When the job ended, well or badly.")
    active_seconds: Count = Field(
        default=0, description="Running time before `activeSince`, for activeDeadlineSeconds."
    )
    active_since: Timestamp | None = Field(default=None, description="Start of the present running period.")
    images: Images | None = Field(default=None, description="Images pinned at acceptance.")
    model: ArtifactStatus | None = Field(
        default=None, description="Starting weights: fetched, or resolved from job://."
    )
    prepare: PrepareStatus | None = Field(default=None, description="The prepare Job.")
    progress: JobProgress | None = Field(default=None, description="Progress of the whole job.")
    stages: Annotated[list[StageStatus], Field(max_length=16, json_schema_extra=list_map("name"))] = Field(
        default=[], description="One entry a stage, in the order of the spec."
    )
    endpoint: EndpointStatus | None = Field(default=None, description="The endpoint that serves the result.")
