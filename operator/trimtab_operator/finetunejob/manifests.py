"""The objects of an attempt: ConfigMap with the stage's JSON, headless Service, Indexed Job; and the endpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trimtab_operator.api.data import LossValidation, Validation
from trimtab_operator.api.finetunejob import FineTuneJob, Rollout
from trimtab_operator.api.pod import PodShape
from trimtab_operator.api.ppo import Ppo
from trimtab_operator.api.stage import Dpo
from trimtab_operator.api.status import ArtifactStatus, Images, StageStatus
from trimtab_operator.core import podtemplate
from trimtab_operator.core.kube import CONFIGMAP, JOB, MODELENDPOINT, SERVICE, Kind, Object
from trimtab_operator.core.names import (
    COMPONENT_PREPARE,
    COMPONENT_TRAIN,
    LABEL_ATTEMPT,
    LABEL_COMPONENT,
    LABEL_JOB,
    LABEL_MANAGED_BY,
    LABEL_QUEUE,
    LABEL_STAGE,
    MANAGED_BY,
    child_name,
    label_value,
    short_uid,
)
from trimtab_operator.core.settings import Settings
from trimtab_operator.finetunejob.acceptance import secrets_of
from trimtab_operator.finetunejob.merge import Effective, process_memory
from trimtab_operator.finetunejob.network import PROGRESS_PORT
from trimtab_operator.finetunejob.observe import PREPARE, attempt_name, claims_of
from trimtab_operator.finetunejob.prepare import prepare_config
from trimtab_trainer.config import (
    LISTEN_ADDRESS_VARIABLE,
    RENDEZVOUS_VARIABLE,
    TERMINATION_LOG_VARIABLE,
    VOLUMES_VARIABLE,
    Artifact,
    JobIdentity,
    TrainConfig,
    dump,
)
from trimtab_trainer.settings import Contract, EarlyStopping, Preference

RENDEZVOUS_PORT = 29500
CONFIG_FILE = "stage.json"
_CPU_RESOURCES = ("cpu", "memory", "ephemeral-storage")
"""What prepare may take of the first stage's resources: no accelerator."""


def prepare_objects(
    obj: Object, job: FineTuneJob, stages: tuple[Effective, ...], attempt: int, images: Images, settings: Settings
) -> list[Object]:
    """ConfigMap and Job of one attempt of prepare, in the order in which they are created."""
    config = prepare_config(_identity(obj), job, stages, job.status.model)
    labels = _labels(obj, PREPARE, attempt)
    shape = stages[0].stage
    root = podtemplate.claim_of(job.spec.artifacts.uri)
    claims = {name: name != root for name in sorted(claims_of(job) | _claims(job.status.model))}
    secret_volumes, secret_mounts = podtemplate.secrets(secrets_of(job))
    return _attempt_objects(
        obj,
        "",
        attempt,
        labels,
        config,
        shape=shape.model_copy(update={"runtime_class_name": None}),
        image=shape.image or images.trainer,
        resources=podtemplate.resources(shape.resources, only=_CPU_RESOURCES),
        claims=claims,
        environment={},
        volumes=secret_volumes,
        mounts=secret_mounts,
        grace_seconds=settings.stop_grace_seconds,
    )


def train_objects(
    obj: Object,
    job: FineTuneJob,
    stage: Effective,
    status: StageStatus,
    model: ArtifactStatus | None,
    results: Mapping[str, ArtifactStatus],
    images: Images,
    settings: Settings,
) -> list[Object]:
    """ConfigMap, headless Service and Indexed Job of one attempt of a stage.

    `model`: its starting weights. `results`: of the stages that are done, by name.
    """
    attempt = status.attempt
    image = stage.stage.image or images.trainer
    config = train_config(obj, job, stage, status, model, results, image, settings)
    labels = _labels(obj, stage.name, attempt)
    root = podtemplate.claim_of(job.spec.artifacts.uri) or ""
    claims = {root: False} | dict.fromkeys(_claims(model) - {root}, True)
    service = service_name(obj, stage.name)
    environment: dict[str, str | Object] = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    if stage.nodes > 1:
        name, uid, namespace = _names(obj)
        first = f"{attempt_name(name, uid, stage.name, attempt)}-0"
        environment[RENDEZVOUS_VARIABLE] = f"{first}.{service}.{namespace}.svc:{RENDEZVOUS_PORT}"
    config_map, job_object = _attempt_objects(
        obj,
        stage.name,
        attempt,
        labels,
        config,
        shape=stage.stage,
        image=image,
        resources=podtemplate.resources(stage.stage.resources),
        claims=claims,
        environment=environment,
        grace_seconds=settings.stop_grace_seconds,
        nodes=stage.nodes,
        queue=job.spec.queue_name if settings.queues else None,
        subdomain=service,
    )
    return [config_map, _service(obj, service, labels), job_object]


def train_config(
    obj: Object,
    job: FineTuneJob,
    stage: Effective,
    status: StageStatus,
    model: ArtifactStatus | None,
    results: Mapping[str, ArtifactStatus],
    image: str,
    settings: Settings,
) -> TrainConfig:
    """The stage's JSON; its prepared data must be known."""
    if status.prepared is None:
        raise ValueError(f"stage {stage.name} is not prepared")
    root = job.spec.artifacts.uri
    digest = status.prepared.digest
    validation = stage.task.validation
    start = Artifact(uri=model.uri, digest=model.digest) if model else None
    ppo = stage.task if isinstance(stage.task, Ppo) else None
    return TrainConfig(
        job=_identity(obj),
        stage=stage.name,
        type=stage.type,
        attempt=status.attempt,
        folder=stage_folder(obj, job, stage.name),
        prepared=Artifact(uri=f"{root}/prepared/{digest.removeprefix('sha256:')}", digest=digest),
        model=start,
        reference=start if isinstance(stage.task, Dpo | Ppo) else None,
        reward=_result(ppo.reward_from if ppo else None, results),
        held_out_reward=_result(ppo.held_out_reward_from if ppo else None, results),
        ppo=stage.ppo,
        recipe=stage.recipe,
        lora=stage.lora,
        preference=_preference(stage.task) if isinstance(stage.task, Dpo) else None,
        checkpoint=stage.checkpoint,
        validation_every_steps=validation.every_steps if validation else None,
        early_stopping=_early_stopping(validation),
        precision=stage.precision,
        zero_stage=stage.zero_stage,
        autotune=stage.autotune,
        process_memory_bytes=process_memory(stage),
        nodes=stage.nodes,
        processes_per_node=stage.processes,
        threads=stage.threads(settings.cpu_threads),
        progress_deadline_seconds=stage.stage.progress_deadline_seconds,
        progress_port=PROGRESS_PORT,
        images={"trainer": image},
    )


def _result(name: str | None, results: Mapping[str, ArtifactStatus]) -> Artifact | None:
    """Of the stage of that name, where one is named."""
    return Artifact(uri=results[name].uri, digest=results[name].digest) if name else None


def _early_stopping(validation: Validation | None) -> EarlyStopping | None:
    if not isinstance(validation, LossValidation) or validation.early_stopping is None:
        return None
    return EarlyStopping(**validation.early_stopping.model_dump(exclude_none=True))


def _preference(task: Dpo) -> Preference:
    return Preference(**task.model_dump(exclude_none=True, include=set(Preference.model_fields)))


def stage_folder(obj: Object, job: FineTuneJob, stage: str) -> str:
    """URI of the folder that holds everything of a stage: `<root>/<job>-<first 8 of uid>/<stage>`."""
    name, uid, _ = _names(obj)
    return f"{job.spec.artifacts.uri}/{name}-{short_uid(uid)}/{stage}"


def service_name(obj: Object, stage: str) -> str:
    """The headless Service of a stage; one for all its attempts, which never overlap."""
    name, uid, _ = _names(obj)
    return child_name(name, uid, stage)


def endpoint_model(obj: Object, artifact: ArtifactStatus) -> Object:
    """`spec.model` of the endpoint that serves a result of this job."""
    name, uid, _ = _names(obj)
    return {"uri": artifact.uri, "digest": artifact.digest, "source": {"jobName": name, "jobUID": uid}}


def endpoint(obj: Object, rollout: Rollout, artifact: ArtifactStatus, *, create: bool) -> Object:
    """The ModelEndpoint: whole from `rollout.create` where absent, else `spec.model` only. It outlives the job."""
    whole = (
        rollout.create.model_dump(mode="json", by_alias=True, exclude_none=True) if create and rollout.create else {}
    )
    return {
        **_head(MODELENDPOINT, rollout.endpoint_name, obj["metadata"]["namespace"]),
        "spec": {**whole, "model": endpoint_model(obj, artifact)},
    }


def _attempt_objects(
    obj: Object,
    role: str,
    attempt: int,
    labels: Mapping[str, str],
    config: Contract,
    *,
    shape: PodShape,
    image: str,
    resources: Object,
    claims: Mapping[str, bool],
    environment: Mapping[str, str | Object],
    grace_seconds: int,
    volumes: list[Object] | None = None,
    mounts: list[Object] | None = None,
    nodes: int = 1,
    queue: str | None = None,
    **pod_fields: Any,
) -> list[Object]:
    name, uid, _ = _names(obj)
    child = attempt_name(name, uid, role, attempt)
    claim_volumes, claim_mounts, table = podtemplate.claims(claims)
    container = podtemplate.container(
        "trainer",
        image,
        ["python", "-m", "trimtab_trainer", f"{podtemplate.CONFIG_PATH}/{CONFIG_FILE}"],
        [*claim_mounts, *(mounts or [])],
        env=podtemplate.environment(
            {
                VOLUMES_VARIABLE: table,
                TERMINATION_LOG_VARIABLE: podtemplate.TERMINATION_LOG,
                LISTEN_ADDRESS_VARIABLE: podtemplate.POD_IP,
                **environment,
            },
            shape,
        ),
        ports=[{"name": "progress", "containerPort": PROGRESS_PORT, "protocol": "TCP"}] if role else [],
        resources=resources,
    )
    template = podtemplate.template(
        shape,
        labels=labels,
        config_map=child,
        container=container,
        volumes=[*claim_volumes, *(volumes or [])],
        grace_seconds=grace_seconds,
        restartPolicy="Never",
        **pod_fields,
    )
    config_map = {
        **_child(CONFIGMAP, obj, child, labels),
        "immutable": True,
        "data": {CONFIG_FILE: dump(config)},
    }
    job = {
        **_child(JOB, obj, child, {**labels, **({LABEL_QUEUE: queue} if queue else {})}),
        "spec": {
            **({"suspend": True} if queue else {}),  # Kueue's from here on: it admits, evicts and sets the nodes
            "completionMode": "Indexed",
            "completions": nodes,
            "parallelism": nodes,
            "backoffLimit": 0,
            "podReplacementPolicy": "Failed",
            "template": template,
        },
    }
    return [config_map, job]


def _service(obj: Object, name: str, labels: Mapping[str, str]) -> Object:
    return {
        **_child(SERVICE, obj, name, {key: value for key, value in labels.items() if key != LABEL_ATTEMPT}),
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,  # rendezvous comes before readiness
            "selector": {key: labels[key] for key in (LABEL_JOB, LABEL_STAGE)},
            "ports": [{"name": "progress", "port": PROGRESS_PORT, "targetPort": "progress", "protocol": "TCP"}],
        },
    }


def _child(kind: Kind, obj: Object, name: str, labels: Mapping[str, str]) -> Object:
    child = _head(kind, name, obj["metadata"]["namespace"])
    child["metadata"] |= {"labels": dict(labels), "ownerReferences": [podtemplate.owner_reference(obj)]}
    return child


def _head(kind: Kind, name: str, namespace: str) -> Object:
    return {
        "apiVersion": kind.api_version,
        "kind": kind.kind,
        "metadata": {"name": name, "namespace": namespace},
    }


def role_labels(obj: Object, role: str) -> dict[str, str]:
    """What all children of prepare or of a stage carry, whatever their attempt."""
    return {
        LABEL_JOB: label_value(obj["metadata"]["name"]),
        **({} if role == PREPARE else {LABEL_STAGE: role}),
        LABEL_COMPONENT: COMPONENT_PREPARE if role == PREPARE else COMPONENT_TRAIN,
        LABEL_MANAGED_BY: MANAGED_BY,
    }


def _labels(obj: Object, role: str, attempt: int) -> dict[str, str]:
    return {**role_labels(obj, role), LABEL_ATTEMPT: str(attempt)}


def _names(obj: Object) -> tuple[str, str, str]:
    metadata = obj["metadata"]
    return metadata["name"], metadata["uid"], metadata["namespace"]


def _identity(obj: Object) -> JobIdentity:
    name, uid, namespace = _names(obj)
    return JobIdentity(namespace=namespace, name=name, uid=uid)


def _claims(artifact: ArtifactStatus | None) -> set[str]:
    claim = podtemplate.claim_of(artifact.uri) if artifact else None
    return {claim} if claim else set()
