"""The kinds that the operator reconciles, put together; on a cluster and in local mode alike."""

from __future__ import annotations

from collections.abc import Sequence

from trimtab_operator.core.complaint_reader import ComplaintReader
from trimtab_operator.core.complaints import ComplaintBoard
from trimtab_operator.core.kube import Kube
from trimtab_operator.core.reconcile import AnyController
from trimtab_operator.core.settings import Settings
from trimtab_operator.core.workers import Companion
from trimtab_operator.finetunejob.board import ProgressBoard
from trimtab_operator.finetunejob.controller import FineTuneJobController
from trimtab_operator.finetunejob.progress import ProgressPoller
from trimtab_operator.modelendpoint.controller import ModelEndpointController


def kinds(kube: Kube, settings: Settings) -> tuple[Sequence[AnyController], Sequence[Companion]]:
    """The controllers, and what runs beside them."""
    progress, complaints = ProgressBoard(), ComplaintBoard()
    controllers = (FineTuneJobController(progress, complaints), ModelEndpointController())
    return controllers, (ProgressPoller(progress, settings), ComplaintReader(kube, complaints, settings))
