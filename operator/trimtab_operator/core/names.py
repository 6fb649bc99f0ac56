"""Derived names and labels: a child's name follows from its parent, never from chance."""

from __future__ import annotations

import hashlib

LABEL_JOB = "trimtab.dev/job"
LABEL_STAGE = "trimtab.dev/stage"
LABEL_ATTEMPT = "trimtab.dev/attempt"
LABEL_ENDPOINT = "trimtab.dev/endpoint"
LABEL_REVISION = "trimtab.dev/revision"
LABEL_COMPONENT = "app.kubernetes.io/component"
LABEL_QUEUE = "kueue.x-k8s.io/queue-name"
"""Kueue's own: the LocalQueue that admits a Job."""
LABEL_MANAGED_BY = "app.kubernetes.io/managed-by"
MANAGED_BY = "trimtab"
ANNOTATION_HASH = "trimtab.dev/desired-hash"

COMPONENT_PREPARE = "prepare"
COMPONENT_TRAIN = "train"
COMPONENT_SERVE = "serve"

MANAGER = "trimtab-operator"
MANAGER_STATUS = "trimtab-operator-status"
MANAGER_ROLLOUT = "trimtab-rollout"

MAX_NAME = 52
"""Longest derived name: leaves 11 characters for `-INDEX` of an Indexed Job's pods and a Deployment's suffixes."""


def short_uid(uid: str) -> str:
    """First 8 characters of a uid, as in `<job>-<first 8 of uid>`."""
    return uid[:8]


def child_name(parent: str, uid: str, *parts: str) -> str:
    """`<parent>-<parts>-<hash>`, at most `MAX_NAME` characters; the hash covers uid and parts, so nothing collides.

    >>> child_name("support", "0d1f", "sft", "2")
    'support-sft-2-81a5fdd8'
    """
    digest = hashlib.sha256("\0".join((uid, *parts)).encode()).hexdigest()[:8]
    stem = "-".join((parent, *parts))[: MAX_NAME - 9].rstrip("-.")
    return f"{stem.replace('.', '-')}-{digest}"


def label_value(name: str) -> str:
    """A name as a label's value (63 characters at most); a longer one ends in a hash of the whole."""
    if len(name) <= 63:
        return name
    return f"{name[:54].rstrip('-.')}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
