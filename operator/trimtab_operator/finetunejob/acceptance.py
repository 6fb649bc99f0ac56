"""What CEL can't say about a spec: named checks in a list, each silent or with a verdict; the first hit wins."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

from trimtab_operator.api import finetunejob_reasons as reasons
from trimtab_operator.api.finetunejob import FineTuneJob
from trimtab_operator.api.reasons import Reason
from trimtab_operator.core.addresses import refused_host
from trimtab_operator.core.podtemplate import claim_of, is_object_name
from trimtab_operator.core.quantity import number
from trimtab_operator.core.settings import Settings
from trimtab_operator.finetunejob.merge import Effective, accelerators
from trimtab_operator.finetunejob.observe import Observation, source_of, uris_of
from trimtab_trainer.config import StageType


@dataclass(frozen=True)
class Verdict:
    """Why a job is not accepted."""

    reason: str
    message: str
    final: bool
    """No change outside the spec can mend it."""


@dataclass(frozen=True)
class Question:
    """What the checks look at."""

    name: str
    job: FineTuneJob
    stages: tuple[Effective, ...]
    seen: Observation
    settings: Settings


Check = Callable[[Question], Verdict | None]


def names_can_exist(question: Question) -> Verdict | None:
    """Claims have names that Kubernetes takes, and no path climbs; they become paths in a pod."""
    for uri in uris_of(question.job):
        claim = claim_of(uri)
        if claim is not None and not is_object_name(claim):
            return _final(reasons.BAD_NAME, f"{uri}: {claim!r} is not the name of a PersistentVolumeClaim")
        if claim is not None and ".." in unquote(urlsplit(uri).path).split("/"):
            return _final(reasons.BAD_NAME, f"{uri}: '..' is not allowed in a path")
    return None


def file_uris_are_allowed(question: Question) -> Verdict | None:
    """`file:///` names a path of one machine; a cluster has many."""
    local = next((uri for uri in uris_of(question.job) if uri.startswith("file:")), None)
    if local is None or question.settings.allow_file_uris:
        return None
    return _final(reasons.FILE_URI, f"{local}: file:// works in local mode only; put the data on a claim (pvc://…)")


def hosts_are_servers(question: Question) -> Verdict | None:
    """No URI leads a pod to its node's metadata service or to itself; in local mode the pod is the user's machine."""
    for uri in uris_of(question.job):
        cause = refused_host(uri)
        if cause is not None and not question.settings.allow_file_uris:
            return _final(reasons.BAD_HOST, f"{uri}: {cause}")
    return None


def stages_fit(question: Question) -> Verdict | None:
    """The values of each stage, defaults merged, agree with each other."""
    for stage in question.stages:
        if cause := _misfit(stage) or _autotune_misfit(stage) or _adapter_misfit(stage, question.job):
            return _final(reasons.MISFIT, f"stage {stage.name}: {cause}")
    return None


def model_is_another_jobs(question: Question) -> Verdict | None:
    """A job can't start from its own result."""
    source = source_of(question.job.spec.model.uri)
    if source is None or source[0] != question.name:
        return None
    return _final(reasons.SELF_REFERENCE, f"model.uri job://{'/'.join(source)} names this job; use `from` in a stage")


def claims_exist(question: Question) -> Verdict | None:
    """Every claim that the spec names is there; users create claims, the operator never does."""
    for uri in uris_of(question.job):
        claim = claim_of(uri)
        if claim is None:
            continue
        found = question.seen.claims.get(claim)
        if found is None:
            return _wait(reasons.CLAIM_MISSING, f"{uri}: there is no PersistentVolumeClaim {claim!r}; create it")
        if found.lost:
            return _wait(reasons.CLAIM_LOST, f"{uri}: the volume of claim {claim!r} is lost; restore it")
    return None


def claims_are_shared(question: Question) -> Verdict | None:
    """A stage on several nodes writes its checkpoints and result through one claim."""
    uri = question.job.spec.artifacts.uri
    claim = claim_of(uri) or ""
    found = question.seen.claims.get(claim)
    wide = next((stage for stage in question.stages if stage.nodes > 1), None)
    if found is None or wide is None or "ReadWriteMany" in found.access_modes:
        return None
    modes = ", ".join(found.access_modes) or "no access mode"
    return _final(
        reasons.CLAIM_NOT_SHARED,
        f"stage {wide.name} runs on {wide.nodes} nodes, but claim {claim!r} of artifacts.uri is {modes}; "
        "use a ReadWriteMany claim, or nodes: 1",
    )


def endpoint_is_known(question: Question) -> Verdict | None:
    """Found out before a GPU is claimed: the rollout has a target."""
    rollout = question.job.spec.rollout
    if rollout is None or rollout.create is not None or question.seen.endpoint is not None:
        return None
    return _wait(
        reasons.ENDPOINT_MISSING,
        f"rollout.endpointName: there is no ModelEndpoint {rollout.endpoint_name!r}; create it",
    )


CHECKS: tuple[Check, ...] = (
    names_can_exist,
    file_uris_are_allowed,
    hosts_are_servers,
    stages_fit,
    model_is_another_jobs,
    claims_exist,
    claims_are_shared,
    endpoint_is_known,
)


def verdict(question: Question) -> Verdict | None:
    """The first check that hits; None: accepted."""
    return next((found for check in CHECKS if (found := check(question)) is not None), None)


def secrets_of(job: FineTuneJob) -> set[str]:
    """Secrets that prepare needs."""
    refs = [job.spec.model.secret_ref]
    for stage in job.spec.stages:
        refs += [source.secret_ref for source in stage.sources]
    return {ref.name for ref in refs if ref is not None}


def _misfit(stage: Effective) -> str | None:
    recipe = stage.recipe
    if recipe.minimum_learning_rate > recipe.learning_rate:
        return (
            f"train.minimumLearningRate {recipe.minimum_learning_rate:g} is above "
            f"train.learningRate {recipe.learning_rate:g}"
        )
    devices = accelerators(stage.stage)
    if stage.stage.accelerator_memory and not devices:
        return "acceleratorMemory is set, but resources.limits has no accelerators"
    if devices and stage.processes > devices:
        return f"processesPerNode is {stage.processes}, but resources.limits has {devices} accelerators"
    if (asked := stage.stage.resources) is not None:
        limits = asked.limits or {}
        for name, value in (asked.requests or {}).items():
            if name in limits and number(value) > number(limits[name]):
                return f"resources.requests {name} {value} is above its limit {limits[name]}"
    return None


def _autotune_misfit(stage: Effective) -> str | None:
    """CEL sees the stage's own fields only."""
    train, parallelism = stage.stage.train, stage.stage.parallelism
    explicit = {
        "train.microBatchSize": train is not None and train.micro_batch_size is not None,
        "parallelism.zeroStage": parallelism is not None and parallelism.zero_stage is not None,
    }
    given = [path for path, is_set in explicit.items() if is_set]
    if not stage.autotune or not given:
        return None
    return f"train.autotune chooses {' and '.join(given)}; remove one or the other, from defaults too"


def _adapter_misfit(stage: Effective, job: FineTuneJob) -> str | None:
    """CEL sees the stage's own `lora` only."""
    if stage.lora is not None and stage.lora.quantization is not None and stage.type is StageType.PPO:
        return (
            f"a {stage.type} stage holds its weights in its own precision; set lora.quantization in the other stages, "
            "not in defaults"
        )
    if stage.lora is not None and stage.lora.quantization is not None and stage.zero_stage == 3:
        return (
            "lora.quantization holds the weights in 4 bits, and parallelism.zeroStage 3 would shard them; "
            "set zeroStage to 2, or remove quantization"
        )
    if stage.lora is None or stage.stage.from_ is not None or job.spec.model.uri is not None:
        return None
    return (
        "lora of defaults adapts a model, and this stage starts from random weights; "
        "set lora in the other stages only, or give model.uri"
    )


def _final(reason: Reason, message: str) -> Verdict:
    return Verdict(reason.name, message, final=True)


def _wait(reason: Reason, message: str) -> Verdict:
    return Verdict(reason.name, message, final=False)
