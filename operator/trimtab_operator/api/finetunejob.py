"""FineTuneJob: a fine-tuning pipeline as one object."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from trimtab_operator.api.base import ApiModel, ArtifactUri, Name, StageName, list_map, rules
from trimtab_operator.api.data import BaseModelSource
from trimtab_operator.api.modelendpoint import Engine
from trimtab_operator.api.pod import Resources
from trimtab_operator.api.ppo import HAS_HELD_OUT, HELD_OUT
from trimtab_operator.api.stage import AUTOTUNE_ALONE, STAGE_RULES, Stage, StageDefaults
from trimtab_operator.api.status import FineTuneJobStatus


class ArtifactStore(ApiModel):
    """Where results go."""

    uri: ArtifactUri = Field(description="pvc://claim/path; several nodes need a ReadWriteMany claim.")


class EndpointTemplate(ApiModel):
    """The ModelEndpoint to create where there is none of that name."""

    served_model_name: Annotated[
        str, Field(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/-]*$")
    ] = Field(description="Name of the model in the OpenAI API.")
    replicas: Annotated[int, Field(ge=0, le=1000)] | None = Field(default=None, description="Pods; 1 by default.")
    resources: Resources | None = Field(default=None, description="CPU, memory and accelerators of each pod.")
    engine: Engine | None = Field(default=None, description="vLLM options.")


class Rollout(ApiModel):
    """Serve a stage's result. The endpoint outlives the job."""

    from_: StageName = Field(alias="from", description="Stage whose result is served.")
    endpoint_name: Name = Field(description="ModelEndpoint of this namespace.")
    create: EndpointTemplate | None = Field(
        default=None, description="Create the endpoint with this where it is absent."
    )


_FROM_KNOWN = (
    "self.stages.all(s, !has(s.from) || self.stages.exists(e, e.name == s.from))",
    "from must name a stage of this job",
)
# Of the two stages the one that is started from must come first; indexOf would exceed the limit on a rule's cost.
_FROM_EARLIER = (
    "self.stages.all(s, !has(s.from) || (s.from != s.name"
    " && self.stages.filter(e, e.name == s.from || e.name == s.name)[0].name == s.from))",
    "from must name an earlier stage of the list, so that no cycle can arise",
)
_ROLLOUT_KNOWN = (
    "!has(self.rollout) || self.stages.exists(s, s.name == self.rollout.from)",
    "rollout.from must name a stage of this job",
)
_DPO_STARTS = (
    "self.stages.all(s, !has(s.dpo) || has(s.from) || has(self.model.uri))",
    "a dpo stage starts from a model, which is its reference too; give from, or model.uri",
)
_LORA_STARTS = (
    "self.stages.all(s, !has(s.lora) || has(s.from) || has(self.model.uri))",
    "lora adapts a model, random weights are none; give from, or model.uri",
)
_REWARD_STARTS = (
    "self.stages.all(s, !has(s.reward) || has(s.from) || has(self.model.uri))",
    "a reward stage starts from a model; give from, or model.uri",
)
_REWARD_ENDS = (
    "self.stages.all(s, !has(s.from) || !self.stages.exists(e, has(e.reward) && e.name == s.from))",
    "from names a reward stage, whose result scores texts and can't write any; start from another stage",
)
_REWARD_NOT_SERVED = (
    "!has(self.rollout) || !self.stages.exists(s, has(s.reward) && s.name == self.rollout.from)",
    "rollout.from names a reward stage, whose result scores texts and can't write any; serve another stage's",
)
_PPO_STARTS = (
    "self.stages.all(s, !has(s.ppo) || has(s.from) || has(self.model.uri))",
    "a ppo stage starts from a model, which is its reference too; give from, or model.uri",
)


def _names_reward_stage(field: str, given: str) -> tuple[tuple[str, str], tuple[str, str]]:
    """A field of `ppo`, where it is given, names a stage of type reward, and an earlier one."""
    return (
        (
            f"self.stages.all(s, !has(s.ppo) || !({given})"
            f" || self.stages.exists(e, has(e.reward) && e.name == s.ppo.{field}))",
            f"ppo.{field} must name a stage of type reward of this job",
        ),
        (
            f"self.stages.all(s, !has(s.ppo) || !({given}) || self.stages.filter(e, e.name == s.name"
            f" || e.name == s.ppo.{field})[0].name == s.ppo.{field})",
            f"ppo.{field} must name an earlier stage of the list",
        ),
    )


_PPO_REWARD = _names_reward_stage("rewardFrom", "has(s.ppo.rewardFrom)")
_PPO_HELD_OUT = _names_reward_stage(HELD_OUT, HAS_HELD_OUT.format("s.ppo"))
_PPO_QUANTIZED = (
    "self.stages.all(s, !has(s.ppo) || !has(s.lora) || !has(s.lora.quantization))",
    "a ppo stage holds its weights in its own precision; remove lora.quantization",
)
_SAME_STAGES = (
    "self.stages.map(s, s.name) == oldSelf.stages.map(s, s.name)",
    "the stages of a job are fixed; create a new job for a new experiment",
)


def _same(new: str, old: str, field: str) -> str:
    """CEL: the field is present and equal on both sides, or absent on both."""
    return f"has({new}.{field}) == has({old}.{field}) && (!has({new}.{field}) || {new}.{field} == {old}.{field})"


_QUEUE_WHILE_SUSPENDED = (
    "self.suspend || oldSelf.suspend || " + _same("self", "oldSelf", "queueName"),
    "queueName can change only while the job is suspended; set suspend: true first",
)
_SHAPE = ("resources", "nodes", "processesPerNode")
"""May change while the job is suspended."""
_TOLERANT = ("retries", "progressDeadlineSeconds")
"""May change at any time."""


def _frozen(model: type[ApiModel], *free: str) -> list[tuple[str, str]]:
    """One immutability rule for each field of `model` but the free ones."""
    names = [field.alias or name for name, field in model.model_fields.items()]
    return [
        (_same("self", "oldSelf", name), f"{name} can't be changed; create a new job for a new experiment")
        for name in names
        if name not in free
    ]


_SHAPE_WHILE_SUSPENDED = (
    "self.suspend || oldSelf.suspend || ("
    + "self.stages.all(s, oldSelf.stages.exists(o, o.name == s.name && "
    + " && ".join(f"({_same('s', 'o', field)})" for field in _SHAPE)
    + ")) && has(self.defaults) == has(oldSelf.defaults) && (!has(self.defaults) || ("
    + " && ".join(f"({_same('self.defaults', 'oldSelf.defaults', field)})" for field in _SHAPE)
    + ")))",
    f"{', '.join(_SHAPE)} can change only while the job is suspended; set suspend: true first",
)


def _set_in_defaults(side: str, field: str) -> str:
    return f"has({side}.defaults) && has({side}.defaults.{field})"


def _fixed_defaults() -> list[tuple[str, str]]:
    """One rule for each frozen field of `defaults`: those of `FrozenDefaults` rest where `defaults` comes or goes."""
    names = [field.alias or name for name, field in StageDefaults.model_fields.items()]
    return [
        (
            f"({_set_in_defaults('self', name)}) == ({_set_in_defaults('oldSelf', name)})",
            f"defaults.{name} can't be changed; create a new job for a new experiment",
        )
        for name in names
        if name not in (*_SHAPE, *_TOLERANT)
    ]


class FrozenDefaults(StageDefaults):
    """Fields that any stage may have, fixed from creation where they define the result."""

    model_config = StageDefaults.model_config | {
        "json_schema_extra": rules(AUTOTUNE_ALONE, *_frozen(StageDefaults, *_SHAPE, *_TOLERANT))
    }


class FrozenStage(Stage):
    """One step of the pipeline. Exactly one stage type is set; what defines the result is fixed from creation."""

    model_config = Stage.model_config | {
        "json_schema_extra": rules(*STAGE_RULES, AUTOTUNE_ALONE, *_frozen(Stage, "name", *_SHAPE, *_TOLERANT))
    }


class FineTuneJobSpec(ApiModel):
    """What to train, on what, in which order, and what to serve."""

    model_config = ApiModel.model_config | {
        "json_schema_extra": rules(
            _FROM_KNOWN,
            _FROM_EARLIER,
            _ROLLOUT_KNOWN,
            _DPO_STARTS,
            _REWARD_STARTS,
            _REWARD_ENDS,
            _REWARD_NOT_SERVED,
            _PPO_STARTS,
            *_PPO_REWARD,
            *_PPO_HELD_OUT,
            _PPO_QUANTIZED,
            _LORA_STARTS,
            _SAME_STAGES,
            _SHAPE_WHILE_SUSPENDED,
            *_fixed_defaults(),
            _QUEUE_WHILE_SUSPENDED,
            *(
                (_same("self", "oldSelf", name), f"{name} can't be changed; create a new job for a new experiment")
                for name in ("model", "artifacts", "rollout")
            ),
        )
    }

    model: BaseModelSource = Field(description="Starting weights of the stages that have no from.")
    artifacts: ArtifactStore = Field(description="Where results go.")
    queue_name: Name | None = Field(
        default=None,
        description="Kueue LocalQueue of this namespace that admits the training pods. Changes while suspended only.",
    )
    suspend: bool = Field(
        default=False, description="Save a checkpoint, stop and free the accelerators; false resumes."
    )
    active_deadline_seconds: Annotated[int, Field(ge=1, le=31_536_000)] | None = Field(
        default=None, description="Running time of the whole job; time queued or suspended does not count."
    )
    starting_deadline_seconds: Annotated[int, Field(ge=1, le=31_536_000)] | None = Field(
        default=None,
        description="A job is ended whose attempt has pods that have not started so long; time queued does not count.",
    )
    ttl_seconds_after_finished: Annotated[int, Field(ge=0, le=315_360_000)] | None = Field(
        default=None, description="Delete the job so long after its end. Artifacts and endpoints stay."
    )
    defaults: FrozenDefaults | None = Field(
        default=None, description="Any stage field for all stages; a stage overrides it. Maps merge, lists replace."
    )
    stages: Annotated[list[FrozenStage], Field(min_length=1, max_length=16, json_schema_extra=list_map("name"))] = (
        Field(description="Steps of the pipeline; a stage refers to earlier ones only.")
    )
    rollout: Rollout | None = Field(default=None, description="Serve a stage's result.")


class FineTuneJob(ApiModel):
    """A fine-tuning pipeline: stages, their data and hyper-parameters, and the roll-out of the result."""

    api_version: str
    kind: str
    metadata: dict[str, Any]
    spec: FineTuneJobSpec
    status: FineTuneJobStatus = FineTuneJobStatus()
