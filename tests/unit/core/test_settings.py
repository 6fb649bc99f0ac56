"""What the process reads from its environment."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from trimtab_operator.core import settings
from trimtab_operator.core.settings import from_environment


def test_a_replica_is_named_after_its_pod() -> None:
    found = from_environment({"POD_NAME": "operator-5d", "POD_NAMESPACE": "trimtab-system"})
    assert (found.identity, found.lease_namespace) == ("operator-5d", "trimtab-system")
    assert (found.leader_election, found.lease_name) == (True, "trimtab-operator")
    given = {"TRIMTAB_OPERATOR_IDENTITY": "me", "TRIMTAB_OPERATOR_LEASE_NAMESPACE": "there"}
    found = from_environment({"POD_NAME": "operator-5d", "POD_NAMESPACE": "trimtab-system", **given})
    assert (found.identity, found.lease_namespace) == ("me", "there")


def test_the_namespace_is_the_service_accounts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "POD_NAMESPACE_FILE", file := tmp_path / "namespace")
    assert from_environment({}).lease_namespace == "default"
    file.write_text("trimtab-system\n")
    assert from_environment({}).lease_namespace == "trimtab-system"


@pytest.mark.parametrize(("renew", "retry"), [("10", "1.5"), ("6", "6"), ("6", "7")])
def test_times_that_would_let_two_lead_are_refused(renew: str, retry: str) -> None:
    times = {"TRIMTAB_OPERATOR_RENEW_DEADLINE_SECONDS": renew, "TRIMTAB_OPERATOR_RETRY_PERIOD_SECONDS": retry}
    with pytest.raises(ValidationError, match="retry_period_seconds < renew_deadline_seconds < lease_duration"):
        from_environment(times)
