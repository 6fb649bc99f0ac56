"""Local mode refuses what a real API server refuses: the table is the one that runs against both."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from tests.manifests.cases import ACCEPTED_EDITS, REFUSED, REFUSED_EDITS, Refused, RefusedEdit, endpoint, job

from trimtab.manifests.admission import ADMISSIONS, check, checked
from trimtab.manifests.load import Document, InvalidManifest

REPOSITORY = Path(__file__).parents[3]


def refusals(manifest: dict[str, object]) -> str:
    with pytest.raises(InvalidManifest) as raised:
        check(Document(Path("job.yaml"), 3, manifest))
    assert all(fault.startswith("job.yaml:3: ") for fault in raised.value.faults)
    return str(raised.value)


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.id)
def test_refused(case: Refused) -> None:
    message = refusals(case.manifest)
    assert all(word in message for word in case.words), message
    admission = ADMISSIONS[str(case.manifest["kind"])]
    faults = admission.faults(admission.complete(case.manifest), None)
    assert bool(faults) is not case.strict, "what only strict validation refuses is pruned, as by an API server"


@pytest.mark.parametrize("case", [*REFUSED_EDITS, *ACCEPTED_EDITS], ids=lambda case: case.id)
def test_edits(case: RefusedEdit) -> None:
    admission = ADMISSIONS[case.before["kind"]]
    before = admission.complete(case.before)
    assert admission.faults(before, None) == []
    faults = "\n".join(admission.faults(admission.complete(case.after), before))
    assert bool(faults) is bool(case.words)
    assert all(word in faults for word in case.words), faults


def test_an_unknown_field_is_named_with_the_nearest_one() -> None:
    manifest = job()
    manifest["spec"]["stages"][1]["stf"] = manifest["spec"]["stages"][1].pop("sft")
    message = refusals(manifest)
    assert 'spec.stages[1].stf: unknown field "stf"; did you mean sft?' in message
    assert "set exactly one stage type" in message


def test_what_is_free_form_is_kept() -> None:
    model = {"config": {"model_type": "llama", "rope": {"deep": [1, {"x": None}]}}, "tokenizer": {"train": {}}}
    complete = ADMISSIONS["FineTuneJob"].complete(job(model=model))
    assert complete["spec"]["model"]["config"] == model["config"]


@pytest.mark.parametrize("value", [True, 1.5, {}, None])
def test_a_quantity_is_an_integer_or_a_string(value: object) -> None:
    manifest = endpoint(resources={"limits": {"cpu": value}})
    assert "spec.resources.limits.cpu" in refusals(manifest)


def test_another_kind_is_refused_with_the_known_ones() -> None:
    message = refusals({"apiVersion": "batch/v1", "kind": "CronJob", "metadata": {"name": "x", "namespace": "default"}})
    assert "CronJob" in message
    assert "FineTuneJob (trimtab.dev/v1alpha1)" in message


def test_the_examples_are_valid_and_all_faults_come_at_once(tmp_path: Path) -> None:
    assert checked(sorted((REPOSITORY / "examples").glob("*/*.yaml")))  # those of other projects lie deeper
    bad = [tmp_path / f"{index}.yaml" for index in range(2)]
    for path in bad:
        path.write_text(yaml.safe_dump(job(stages=[])))
    with pytest.raises(InvalidManifest) as raised:
        checked([*bad, tmp_path / "absent.yaml"])
    assert len(raised.value.faults) == 3
