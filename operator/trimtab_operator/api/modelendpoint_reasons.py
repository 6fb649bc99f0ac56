"""Every condition reason of a ModelEndpoint, with its meaning and what to do; docs/status.md is made of it."""

from __future__ import annotations

from trimtab_operator.api.reasons import Reason

READY = "Ready"
PROGRESSING = "Progressing"
DEGRADED = "Degraded"

CONDITIONS: dict[str, str] = {
    READY: "At least one pod of the served revision has answered a completion and answers requests.",
    PROGRESSING: "A revision is starting, or waits for its model.",
    DEGRADED: "A pod can't serve; reason and message say why. What was served before is still served.",
}

SERVING = Reason("Serving", "Pods answer.")
SCALED_TO_ZERO = Reason("ScaledToZero", "`replicas` is 0.", "Scale it up to serve, or to prove a new model.")
NO_MODEL = Reason("NoModel", "No revision has been ready yet.", "See the other conditions.")
NO_READY_POD = Reason("NoReadyPod", "No pod of the served revision is ready.", "See the other conditions.")
STARTING = Reason("Starting", "Pods verify and load the model; each must answer a completion first.")
AT_REST = Reason("AtRest", "The revision that the spec asks for is served by all replicas.")
WAITING_FOR_ARTIFACT = Reason(
    "WaitingForArtifact", "The job or stage that `model.uri` names has no result yet.", "Wait, or create that job."
)
ARTIFACT_FAILED = Reason(
    "ArtifactUnavailable", "The job that `model.uri` names has failed, or has no such stage.", "Name another result."
)
BAD_NAME = Reason("BadName", "The claim or path of `model.uri` can't exist.", "Set a valid `spec.model`.")
INVALID_SPEC = Reason("InvalidSpec", "The spec does not fit this operator's schema.", "Change it as the message says.")
HEALTHY = Reason("Healthy", "No pod reports a problem.")
POD_FAILED = Reason("PodFailed", "A pod ended and left no report.", "See its log: kubectl logs POD --previous.")

PODS = (
    Reason("CorruptArtifact", "A file of the artifact differs from its manifest: never served.", "Restore the file."),
    Reason("InputMissing", "The artifact is not there.", "See the message."),
    Reason("UnsafeInput", "The artifact holds code or pickles: never served.", "Use a safetensors model without code."),
    Reason("BadConfiguration", "vLLM can't run this model with these options.", "See the message."),
    Reason("AddressUnavailable", "The server's address or port is taken.", "See the message."),
    Reason("StorageError", "The volume can't be read.", "See the message."),
    Reason("OOMKilled", "A pod ran out of memory.", "Raise the memory limit, or lower engine.maxModelLen."),
    Reason("CrashLoop", "A container ends again and again.", "See its log: kubectl logs POD --previous."),
    Reason("ImagePullFailed", "An image can't be pulled.", "Check its name and `imagePullSecrets`."),
    Reason("QuotaExceeded", "A ResourceQuota has no room for a pod; the message is the API server's.", "Raise it."),
    Reason(
        "PodsRefused",
        "An admission rule refuses the pods: Pod Security, a policy, webhook, LimitRange or absent ServiceAccount.",
        "Change what the message names.",
    ),
    Reason("InitFailed", "An init container, which an admission webhook added, fails.", "See its log."),
    Reason("NodeNotReady", "The node of a pod does not answer.", "kubectl describe node NODE."),
    Reason("CreateFailed", "The kubelet can't create a container.", "See the message."),
    Reason("Unschedulable", "No node fits a pod; the message is the scheduler's.", "Free or add capacity."),
    Reason("SchedulingGated", "A scheduling gate holds a pod back.", "See who set the gate."),
)
"""Reasons that come from the pods."""


def all_reasons() -> list[Reason]:
    """Every reason once, in the order of this file."""
    return [*(value for value in globals().values() if isinstance(value, Reason)), *PODS]
