"""Every condition reason of a FineTuneJob, with its meaning and what to do; docs/status.md is made of it."""

from __future__ import annotations

from trimtab_operator.api.reasons import Reason

ACCEPTED = "Accepted"
PREPARED = "Prepared"
PROGRESSING = "Progressing"
SUSPENDED = "Suspended"
ROLLED_OUT = "RolledOut"
COMPLETE = "Complete"
FAILED = "Failed"

CONDITIONS: dict[str, str] = {
    ACCEPTED: "The operator has checked the spec and will run it.",
    PREPARED: "Models and data are fetched, validated and tokenized; the stages' needs are estimated.",
    PROGRESSING: "Work goes on. False: nothing moves; reason and message say why.",
    SUSPENDED: "No pod of the job runs, as `spec.suspend` asks.",
    ROLLED_OUT: "The endpoint serves the result. Only with `spec.rollout`.",
    COMPLETE: "The job ended well; with a `rollout` its model is served. Final.",
    FAILED: "The job ended badly; reason and message name cause, place and remedy. Final.",
}

# Accepted
IS_ACCEPTED = Reason("Accepted", "The spec passed every check.")
INVALID_SPEC = Reason(
    "InvalidSpec", "The stored spec does not fit this operator's schema.", "Create a new job as the message says."
)
BAD_NAME = Reason("BadName", "A claim's name or a path can't exist.", "Create a new job with a valid name.")
FILE_URI = Reason(
    "FileUriNotAllowed", "`file:///` is for local mode only.", "Put the data on a claim or in an object store."
)
BAD_HOST = Reason(
    "HostNotAllowed", "A URI leads to the pod itself or to its node's metadata service.", "Name the server of the file."
)
MISFIT = Reason("InvalidStage", "The values of a stage, defaults merged, contradict each other.", "See the message.")
CLAIM_MISSING = Reason("ClaimMissing", "A PersistentVolumeClaim is not there.", "Create it; the job goes on by itself.")
CLAIM_LOST = Reason("ClaimLost", "The volume behind a claim is gone.", "Restore the volume, or recreate the claim.")
CLAIM_NOT_SHARED = Reason(
    "ClaimNotShared",
    "Several nodes need a ReadWriteMany claim, and this one is not.",
    "Use a ReadWriteMany claim, or one node.",
)
ENDPOINT_MISSING = Reason(
    "EndpointMissing",
    "`rollout` names a ModelEndpoint that is absent, and has no `create`.",
    "Create the endpoint; the job goes on by itself.",
)
SELF_REFERENCE = Reason("SelfReference", "`model.uri` names this very job.", "Name another job.")
WAITING_FOR_ARTIFACT = Reason(
    "WaitingForArtifact", "The job or stage that `model.uri` names has no result yet.", "Wait, or create that job."
)
ARTIFACT_FAILED = Reason(
    "ArtifactUnavailable", "The job that `model.uri` names has failed, or has no such stage.", "Name another result."
)

# Prepared, Progressing, Suspended
PREPARING = Reason("Preparing", "The prepare pod fetches and checks model and data.")
IS_PREPARED = Reason("Prepared", "Every stage's data are ready.")
NOT_PREPARED = Reason("NotPrepared", "Prepare has not begun.")
RUNNING = Reason("Running", "A stage trains.")
RETRYING = Reason("Retrying", "An attempt failed; the next one follows.", "See status.stages[].failures.last.")
STOPPING = Reason("Stopping", "The pods of an ended attempt are being removed; the next attempt waits for that.")
STARTING = Reason("Starting", "The next attempt is about to be created.")
IS_SUSPENDED = Reason("Suspended", "`spec.suspend` is set.", "Set it to false to go on from the last checkpoint.")
NOT_SUSPENDED = Reason("NotSuspended", "`spec.suspend` is not set.")
SUSPENDING = Reason("Suspending", "Pods are saving a checkpoint and ending.")
FINISHED = Reason("Finished", "The job has ended.")
UNSCHEDULABLE = Reason("Unschedulable", "No node fits a pod; the message is the scheduler's.", "Free or add capacity.")
GATED = Reason("SchedulingGated", "A scheduling gate holds a pod back.", "See who set the gate.")
IMAGE_PULL = Reason("ImagePullFailed", "An image can't be pulled.", "Check its name and `imagePullSecrets`.")
CREATE_FAILED = Reason("CreateFailed", "The kubelet can't create a container.", "See the message.")
INIT_FAILED = Reason("InitFailed", "An init container, which an admission webhook added, fails.", "See its log.")
MOUNT_FAILED = Reason(
    "MountFailed",
    "The kubelet can't mount a volume; the message is the kubelet's.",
    "Create the Secret or mend the volume that it names; the pod goes on by itself.",
)
CRASH_LOOP = Reason("CrashLoop", "A container ends again and again.", "See its log: kubectl logs POD --previous.")
QUOTA = Reason(
    "QuotaExceeded",
    "A ResourceQuota of the namespace has no room for a pod; the message is the API server's.",
    "Wait, end other work, or have the quota raised; the job goes on by itself.",
)
PODS_REFUSED = Reason(
    "PodsRefused",
    "An admission rule refuses the pods: Pod Security, a policy or webhook, a LimitRange, an absent ServiceAccount.",
    "Change what the message names; the Job controller tries again once a minute.",
)
NO_POD = Reason(
    "NoPod",
    "The Job controller has created too few pods for a minute, and no Event says why.",
    "kubectl describe job JOB; see whether kube-controller-manager works.",
)
SLOW_START = Reason(
    "SlowStart",
    "A pod has a node but has not started for five minutes.",
    "kubectl describe pod POD; often a big image, or a missing Secret or volume.",
)
WAITING_FOR_QUOTA = Reason(
    "WaitingForQuota",
    "Kueue has not admitted the job: it waits in the queue of `queueName`.",
    "kubectl describe workload; check that the LocalQueue exists and Kueue runs.",
)
EVICTED = Reason("Evicted", "Kueue took the quota back; the pods save a checkpoint, and the job is queued again.")
JOB_SUSPENDED = Reason(
    "JobSuspended",
    "Someone other than this job's spec has suspended a Job of it.",
    "See who; Kueue does so to Jobs without a queue in namespaces that it manages.",
)
NODE_NOT_READY = Reason(
    "NodeNotReady",
    "The node of a running pod does not answer. It may come back; after some minutes its pods are taken away.",
    "kubectl describe node NODE.",
)
NODE_LOST = Reason(
    "NodeLost",
    "A pod should have ended and its node does not answer, so that the next attempt can't be sure that it has.",
    "Once the node is surely off: kubectl delete node NODE; the attempt goes on elsewhere for free.",
)
DISRUPTED = Reason("Disrupted", "The cluster takes a pod away (eviction, preemption, lost node); it restarts for free.")

# RolledOut
ROLLING_OUT = Reason("RollingOut", "The endpoint was given the result and is not ready with it yet.")
IS_ROLLED_OUT = Reason("RolledOut", "The endpoint serves the result.")
NOT_ROLLED_OUT = Reason("NotRolledOut", "The stages are not done.")
ENDPOINT_DEGRADED = Reason(
    "EndpointDegraded", "The endpoint can't get ready with the result.", "See kubectl describe mep NAME."
)
SUPERSEDED = Reason(
    "RolloutSuperseded",
    "The endpoint was given another model before this job's was ready.",
    "The result is kept; set the endpoint's spec.model to serve it.",
)

# Complete, Failed
COMPLETED = Reason("Completed", "Every stage is done, and the rollout if there is one.")
DEADLINE = Reason("DeadlineExceeded", "The job ran for `activeDeadlineSeconds`.", "Create a new job with more time.")
STARTING_DEADLINE = Reason(
    "StartingDeadlineExceeded",
    "An attempt's pods did not all start within `startingDeadlineSeconds`.",
    "Mend what the message names, then create a new job, or give it more time.",
)
REPORT_MISSING = Reason(
    "ReportMissing",
    "A pod ended well without a termination message.",
    "Check `image`: it must speak the stage contract.",
)
REPORT_INVALID = Reason(
    "ReportInvalid", "A pod's termination message is not a report.", "Check `image`: it must speak the stage contract."
)
POD_GONE = Reason("PodGone", "A Job failed and its pods are gone, so the cause is unknown.", "See who deletes pods.")

TRAINER = (
    Reason("BadConfiguration", "Exit 64: the configuration or the chat template can't be used.", "See the message."),
    Reason("BadData", "Exit 65: a data file or record is not valid.", "Mend the file and line that the message names."),
    Reason("InputMissing", "Exit 66: a file, model or claim is not there.", "See the message."),
    Reason("UnsafeInput", "Exit 66: a model folder holds code or pickles.", "Use a safetensors model without code."),
    Reason(
        "CorruptArtifact", "Exit 66: a file differs from its manifest.", "Restore the file, or run the stage again."
    ),
    Reason(
        "TrainingFailed", "Exit 70: a loss that is not finite, divergence.", "Lower the learning rate; see message."
    ),
    Reason("NotFinite", "Exit 70: the loss or a gradient is not finite.", "Lower the learning rate; check the data."),
    Reason(
        "MergeDiffers",
        "Exit 70: the merged model's logits differ from those of the model with its adapter by more than rounding.",
        "Set precision: fp32, or train all weights.",
    ),
    Reason(
        "KlTooLarge",
        "Exit 70: the policy has moved further from its starting weights than kl.maximum.",
        "Raise ppo.kl.coefficient, or lower train.learningRate.",
    ),
    Reason(
        "RolloutOutOfSync",
        "Exit 70: vLLM samples with other weights than those in training, by the log-probabilities of its tokens.",
        "Set ppo.rollout.engine: transformers, and report it with the rank's log.",
    ),
    Reason(
        "DoesNotFit",
        "Exit 64: prepare's estimate of a process's memory is above `acceleratorMemory`, or, without "
        "accelerators, above its part of `resources.limits.memory`.",
        "Set what the message names.",
    ),
    Reason("OutOfMemory", "Exit 70: an accelerator ran out of memory.", "Lower microBatchSize or raise zeroStage."),
    Reason("InternalError", "Exit 70: a fault that nobody foresaw.", "Report it with the stack in the pod's log."),
    Reason("PeerLost", "A process lost another one. Retried.", "See the log of the pod that ended first."),
    Reason("ProcessCrashed", "Exit 137: a process died of a signal. Retried.", "The pod's log has its last lines."),
    Reason("Superseded", "A newer attempt has taken the stage over.", "Nothing, if it happens once; else report it."),
    Reason("Preempted", "Exit 75: told to stop, a checkpoint is saved. Goes on for free."),
    Reason("Stalled", "Exit 71: no step for `progressDeadlineSeconds`. Retried.", "The rank logs have all stacks."),
    Reason("StorageError", "Exit 74: the volume is full or can't be written. Retried.", "Make room on the claim."),
    Reason("Killed", "Exit 137: a process was killed. Retried.", "See the node's log."),
    Reason("OOMKilled", "Exit 137: out of memory. Retried.", "Raise the memory limit, or lower microBatchSize."),
    Reason("Error", "Another exit code. Retried.", "See the pod's log."),
)
"""Reasons that come from the pods; a report may bring others of its own."""


def all_reasons() -> list[Reason]:
    """Every reason once, in the order of this file."""
    return [*(value for value in globals().values() if isinstance(value, Reason)), *TRAINER]
