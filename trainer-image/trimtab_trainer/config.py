"""The contract between the operator and a pod: one JSON file in, one termination message out.

The operator builds these models and writes them as JSON; `python -m trimtab_trainer FILE` parses them. Both sides
are closed (`extra="forbid"`). Imports no torch: the operator imports this module.

Paths never stand in the contract, only URIs. `pvc://CLAIM/PATH` is resolved with the table in the environment variable
`TRIMTAB_VOLUMES` (JSON: claim -> directory), so the same file serves a pod and a laptop.
"""

from __future__ import annotations

import json
from enum import IntEnum, StrEnum
from typing import Annotated, Any, Final, Literal

from pydantic import Field, TypeAdapter

from trimtab_trainer.ppo_settings import Ppo
from trimtab_trainer.settings import (
    Cap,
    Checkpoint,
    Contract,
    EarlyStopping,
    FewShot,
    Lora,
    Loss,
    MaxDropped,
    MaxLength,
    OnInvalid,
    OnTooLong,
    Packing,
    Precision,
    Preference,
    Recipe,
    ReplayFraction,
    TaskName,
    Template,
    TokenizerTraining,
    ValidationEverySteps,
    Weight,
    ZeroStage,
)
from trimtab_trainer.verifier_settings import Verifier

CONTRACT_VERSION: Final = 1

VOLUMES_VARIABLE = "TRIMTAB_VOLUMES"
"""JSON object: claim name -> directory where it is mounted."""
TERMINATION_LOG_VARIABLE = "TRIMTAB_TERMINATION_LOG"
"""File that takes the report; the container's `terminationMessagePath`."""
RENDEZVOUS_VARIABLE = "TRIMTAB_RENDEZVOUS"
"""`HOST:PORT` of the pod with completion index 0; torchrun's master."""
NODE_RANK_VARIABLE = "JOB_COMPLETION_INDEX"
"""Set by the Job controller on each pod of an Indexed Job."""
LISTEN_ADDRESS_VARIABLE = "TRIMTAB_LISTEN_ADDRESS"
"""Address on which the pod serves; the pod's IP."""

TERMINATION_MESSAGE_LIMIT = 4096
"""Bytes of a termination message that the kubelet keeps."""


class ExitCode(IntEnum):
    """Exit codes of the trainer's containers, after sysexits(3)."""

    DONE = 0
    BAD_CONFIGURATION = 64
    BAD_DATA = 65
    INPUT_MISSING = 66
    TRAINING_FAILED = 70
    STALLED = 71
    STORAGE_ERROR = 74
    PREEMPTED = 75
    KILLED = 137


class StageType(StrEnum):
    """What a stage does."""

    PRETRAIN = "pretrain"
    SFT = "sft"
    DPO = "dpo"
    REWARD = "reward"
    PPO = "ppo"


COMPARING = frozenset({StageType.REWARD, StageType.DPO})
"""Stages that learn from answers compared with each other."""

STARTING_FROM_MODEL = frozenset({StageType.DPO, StageType.REWARD, StageType.PPO})
"""Stages that random weights are no start for."""

Digest = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]
"""`sha256:` and 64 hex digits; of an artifact: the sha256 of its `manifest.json`."""
Uri = Annotated[str, Field(min_length=1, max_length=2048)]


class JobIdentity(Contract):
    """Whose work this is."""

    namespace: str
    name: str
    uid: str


class DataSource(Contract):
    """One data set. `secretPath` is a directory with the object store's keys (AWS_ACCESS_KEY_ID, HF_TOKEN, …)."""

    uri: Uri
    revision: str | None = None
    secret_path: str | None = None
    weight: Weight = 1.0
    cap: Cap | None = None
    """Of a held-out task: measure so many of its records."""
    replay_fraction: ReplayFraction | None = None
    """Old data: so much of an epoch's loss-bearing tokens, whatever weights and caps say."""
    templates: list[Template] = []
    few_shot: FewShot | None = None
    held_out_task: TaskName | None = None
    running_text: bool = False
    """Running text is welcome whatever the stage learns from, as it is in replay and held-out tasks."""

    @property
    def in_mixture(self) -> bool:
        """Whether weight and cap decide how much of it an epoch takes."""
        return self.replay_fraction is None and self.held_out_task is None


class Validation(Contract):
    """Held-out rows: data of their own, or a fraction split off the training data before mixing."""

    data: list[DataSource] = []
    fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    every_steps: ValidationEverySteps | None = None


class Artifact(Contract):
    """A write-once folder with a manifest."""

    uri: Uri
    digest: Digest


class BaseModelSource(Contract):
    """Where a root stage's weights come from: exactly one of `uri` and `config`."""

    uri: Uri | None = None
    revision: str | None = None
    digest: Digest | None = None
    secret_path: str | None = None
    config: dict[str, Any] | None = None
    """Hugging Face's own keys, `model_type` included; random weights from the recipe's seed."""
    tokenizer_uri: Uri | None = None
    tokenizer_train: TokenizerTraining | None = None


class PrepareStage(Contract):
    """One stage to prepare. `from` names an earlier stage of the same file, whose tokenizer it inherits."""

    name: str
    type: StageType
    from_stage: str | None = None
    from_prepared: Artifact | None = None
    """Prepared data of the `from` stage, where that stage is not in this file."""
    data: list[DataSource]
    validation: Validation | None = None
    loss: Loss = Loss.ALL
    max_length: MaxLength = 2048
    packing: Packing = True
    on_invalid: OnInvalid = OnInvalid.FAIL
    on_too_long: OnTooLong = OnTooLong.FAIL
    max_dropped: MaxDropped = 0
    recipe: Recipe = Recipe()
    lora: Lora | None = None
    reward_stage: str | None = None
    """Of `ppo`: the stage of its reward model, which must have the same tokenizer; absent with a verifier."""
    held_out_reward_stage: str | None = None
    """Of `ppo` with early stopping: the stage of the model that watches, of the same tokenizer."""
    ppo: Ppo | None = None
    """Of `ppo`; absent in other stages."""
    pretraining_mix: list[DataSource] = []
    """Of `ppo`: data of `ppo.pretrainingMix`."""
    demonstrations: list[DataSource] = []
    """Of `reward`: the answers whose mean score becomes the offset; none: the best answers of the data."""
    precision: Precision = Precision.BF16
    zero_stage: ZeroStage = 0
    world_size: int = 1
    accelerator: bool = False
    """Whether the stage's pods ask for accelerators; the estimates depend on it."""
    process_memory_bytes: int | None = None
    """What a process may take: its accelerator's memory, or its part of the pod's; absent: not known."""
    autotune: bool = False
    """Micro-batch size and ZeRO stage are chosen when the stage starts."""

    @property
    def max_new_tokens(self) -> int:
        """Tokens of `maxLength` that are kept for the answer."""
        return self.ppo.rollout.max_new_tokens if self.ppo else 0

    @property
    def verifier(self) -> Verifier | None:
        """What judges the answers; None where a reward model does, or there are none."""
        return self.ppo.verifier if self.ppo else None


class PrepareConfig(Contract):
    """Prepare: fetch, validate, tokenize, plan rows, estimate. CPU only; no GPU is claimed before it is done."""

    contract_version: Literal[1] = 1
    kind: Literal["prepare"] = "prepare"
    job: JobIdentity
    root: Uri
    """The artifact root: prepared data go to `<root>/prepared/<hex>/`, fetched models to `<root>/models/<hex>/`."""
    model: BaseModelSource
    stages: Annotated[list[PrepareStage], Field(min_length=1)]


class TrainConfig(Contract):
    """Train one stage. One file for all pods of an attempt."""

    contract_version: Literal[1] = 1
    kind: Literal["train"] = "train"
    job: JobIdentity
    stage: str
    type: StageType
    attempt: Annotated[int, Field(ge=1)]
    folder: Uri
    """`<root>/<job>-<first 8 of uid>/<stage>`, with `model/`, `metrics.jsonl`, `checkpoints/step-N/`, `logs/`."""
    prepared: Artifact
    """`tokenizer/` (template included), token store and row plans of this stage."""
    model: Artifact | None = None
    """Starting weights; absent: random weights from the prepared folder's `model_config.json`."""
    reference: Artifact | None = None
    """What `dpo` and `ppo` hold the model to: the stage's starting weights."""
    recipe: Recipe = Recipe()
    lora: Lora | None = None
    """Train an adapter on frozen weights; absent: all weights."""
    preference: Preference | None = None
    """Of `dpo`; absent in other stages."""
    reward: Artifact | None = None
    """Of `ppo` without a verifier: the reward model, from which the critic starts too."""
    held_out_reward: Artifact | None = None
    """Of `ppo` with early stopping: the reward model that watches, and that nothing learns from."""
    ppo: Ppo | None = None
    """Of `ppo`; absent in other stages."""
    checkpoint: Checkpoint = Checkpoint()
    validation_every_steps: ValidationEverySteps | None = None
    early_stopping: EarlyStopping | None = None
    """Absent: train to the last step, whose weights are the result."""
    precision: Precision = Precision.BF16
    zero_stage: ZeroStage = 0
    autotune: bool = False
    """The first attempt measures, and chooses micro-batch size and `zero_stage`; `<folder>/autotune.json` keeps it."""
    process_memory_bytes: int | None = None
    """As in `PrepareStage`."""
    nodes: Annotated[int, Field(ge=1)] = 1
    processes_per_node: Annotated[int, Field(ge=1)] = 1
    threads: Annotated[int, Field(ge=1)] = 1
    """OMP_NUM_THREADS of each process; part of what makes a resume bitwise."""
    progress_deadline_seconds: int | None = None
    progress_port: int = 8080
    images: dict[str, str] = {}
    """Image by role, for the lineage in the manifest."""

    @property
    def stops_early(self) -> bool:
        """Whether measurements of what is held out decide on the end and on the weights of the result."""
        return self.early_stopping is not None or (self.ppo is not None and self.ppo.early_stopping is not None)


class PreparedStage(Contract):
    """What prepare found out about one stage. Nameless, so that 16 of them fit a termination message."""

    digest: Digest
    """sha256 of the prepared folder's `manifest.json`; the folder is `<root>/prepared/<its hex digits>/`."""
    records: int
    """Training records of one epoch, after mixing and drops."""
    dropped: int = 0
    truncated: int = 0
    tokens: int
    """Tokens of one epoch after mixing and truncation, template included, padding excluded."""
    steps: int
    """Optimiser steps of the whole stage."""
    memory_bytes: int
    """Estimated accelerator memory of one process."""
    seconds: int
    """Estimated training time."""
    tokens_per_second: int = 0
    """The speed that `seconds` assumes, over all processes."""
    reused: bool = False


class PrepareReport(Contract):
    """Termination message of a prepare pod that ended well."""

    kind: Literal["prepare"] = "prepare"
    model: Artifact | None = None
    """Fetched base weights; absent for random weights."""
    stages: list[PreparedStage]
    """In the order of the configuration's stages."""


class Metric(Contract):
    """A named value at the end of a stage. `value` is a decimal string: a custom resource's status holds no floats."""

    name: str
    value: str


class CheckpointReport(Contract):
    """A checkpoint that a stage left."""

    step: int
    digest: Digest


class TrainReport(Contract):
    """Termination message of a training pod (completion index 0) that ended well."""

    kind: Literal["train"] = "train"
    digest: Digest
    """Of `<folder>/model/manifest.json`."""
    step: int
    """Steps done: fewer than `total_steps` where the stage stopped early."""
    total_steps: int
    best_step: int | None = None
    """The step whose weights are the result, where it is not the last one."""
    tokens: int = 0
    metrics: list[Metric] = []
    checkpoints: list[CheckpointReport] = []
    already_done: bool = False
    """The stage found its own verified result."""


class FailureReport(Contract):
    """Termination message of a pod that ended badly: one cause, with place and remedy in one message."""

    kind: Literal["failure"] = "failure"
    reason: Annotated[str, Field(pattern=r"^[A-Z][A-Za-z]*$", max_length=64)]
    """CamelCase, fit for a condition's reason."""
    message: Annotated[str, Field(max_length=3000)]
    stage: str | None = None
    step: int | None = None


class Progress(Contract):
    """What `GET /progress` answers (JSON)."""

    step: int
    total_steps: int
    epoch: str
    """Decimal string, e.g. "1.25"."""
    tokens_per_second: int
    estimated_remaining_seconds: int | None = None
    """Until the result is there, pauses included; absent before the first step of the attempt."""
    guessed_at_tokens_per_second: int | None = None
    """The speed that a guess of the remaining time assumes; absent once enough steps are measured."""
    metrics: list[Metric] = []
    checkpoints: list[CheckpointReport] = []


Report = Annotated[PrepareReport | TrainReport | FailureReport, Field(discriminator="kind")]
StageConfig = Annotated[PrepareConfig | TrainConfig, Field(discriminator="kind")]

REPORT: TypeAdapter[PrepareReport | TrainReport | FailureReport] = TypeAdapter(Report)
STAGE_CONFIG: TypeAdapter[PrepareConfig | TrainConfig] = TypeAdapter(StageConfig)


def dump(model: Contract) -> str:
    """Compact JSON of a contract model, without absent values."""
    return model.model_dump_json(by_alias=True, exclude_none=True)


def dump_report(report: PrepareReport | TrainReport | FailureReport) -> str:
    """JSON of a report without defaults, so that it fits `TERMINATION_MESSAGE_LIMIT`."""
    fields = report.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    return json.dumps({"kind": report.kind, **fields}, separators=(",", ":"))
