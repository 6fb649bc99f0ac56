"""The controller of ModelEndpoints: a thin adapter between the one loop and the pure parts."""

from __future__ import annotations

from datetime import datetime

from trimtab_operator.api.base import parsed
from trimtab_operator.api.modelendpoint import ModelEndpoint
from trimtab_operator.core.actions import Plan
from trimtab_operator.core.controller import Reader
from trimtab_operator.core.interests import Interests
from trimtab_operator.core.kube import FINETUNEJOB, MODELENDPOINT, POD, Object, Ref, ref_of
from trimtab_operator.core.names import LABEL_ENDPOINT
from trimtab_operator.core.settings import Settings
from trimtab_operator.modelendpoint.observe import Observation, observe, source_of
from trimtab_operator.modelendpoint.plan import plan


class ModelEndpointController:
    """Reconciles ModelEndpoints."""

    kind = MODELENDPOINT

    def __init__(self) -> None:
        self._interests = Interests()

    def observe(self, reader: Reader, obj: Object) -> Observation:
        """Read the store, and note the job that this endpoint waits for."""
        owner = ref_of(obj)
        endpoint = parsed(ModelEndpoint, obj)
        if endpoint is None:  # the plan says what is wrong
            return Observation()
        source = source_of(endpoint.spec.model.uri)
        self._interests.note(owner, [Ref(FINETUNEJOB.kind, owner.namespace, source[0])] if source else [])
        return observe(reader, obj, endpoint)

    def plan(self, obj: Object, observation: Observation, settings: Settings, now: datetime) -> Plan:
        """The next actions and the whole status."""
        return plan(obj, observation, settings, now)

    def interested(self, obj: Object) -> list[Ref]:
        """Endpoints that wait for this job, or whose pod this is: its ReplicaSet is not watched."""
        found = self._interests.of(ref_of(obj))
        name = obj["metadata"].get("labels", {}).get(LABEL_ENDPOINT)
        if obj["kind"] == POD.kind and name:
            found.append(Ref(MODELENDPOINT.kind, obj["metadata"]["namespace"], name))
        return found
