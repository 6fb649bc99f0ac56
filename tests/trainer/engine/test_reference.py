"""The reference's log-probabilities, computed once: those of each step, found again, and when that is done at all."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tests.trainer.engine import stages
from tests.trainer.engine.test_preference import forward
from tests.trainer.prepare import kit
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from trimtab_trainer import manifest
from trimtab_trainer.config import Artifact, TrainConfig
from trimtab_trainer.data.store import VALIDATION, PreparedData
from trimtab_trainer.engine.batches import MicroBatch, collate
from trimtab_trainer.engine.distributed import Group
from trimtab_trainer.engine.objectives import Pairwise, RecordedPairwise
from trimtab_trainer.engine.reference import LogProbs, Recorder, content_key, pays, remove
from trimtab_trainer.errors import Preempted
from trimtab_trainer.settings import Lora, Preference
from trimtab_trainer.supervisor.fence import Fence

START = Artifact(uri="pvc://models/start", digest="sha256:" + "5" * 64)


class Alone(Group):
    """The only process."""

    def __init__(self) -> None:
        self.device, self.rank, self.size, self.is_first_of_pod = torch.device("cpu"), 0, 1, True

    def sum(self, *values: float | torch.Tensor) -> list[float]:
        return [float(value) for value in values]

    def largest(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        return values


def model() -> PreTrainedModel:
    torch.manual_seed(4)
    config = AutoConfig.for_model(**stages.TINY_LLAMA, initializer_range=0.3)
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()


def online() -> Pairwise:
    network = model()
    return Pairwise(lambda batch: forward(network, batch), Preference())


@pytest.fixture(autouse=True)
def _volume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIMTAB_VOLUMES", json.dumps({"models": str(tmp_path / "volume")}))


def prepared(root: Path, epochs: int = 2, seed: int = 0) -> PreparedData:
    """Nine rows of pairs an epoch, each epoch in an order of its own, and three held out."""
    found = stages.write_prepared(
        root, row_counts=[9] * epochs, batch=4, validation=3, stage_type=stages.StageType.DPO, seed=seed
    )
    return PreparedData(root / "volume" / "prepared" / found.digest.removeprefix("sha256:"))


def config(**changes: object) -> TrainConfig:
    settings = {"type": "dpo", "model": START, "reference": START, "preference": Preference()}
    return stages.stage(START, **{**settings, "folder": "pvc://models/dpo", **changes})


def recorder(data: PreparedData, told_to_stop: Callable[[], bool] = lambda: False, **changes: object) -> Recorder:
    changed = config(recipe={"micro_batch_size": 2}, **changes)
    return Recorder(changed, Alone(), data, Fence(Path("/nowhere"), 1), told_to_stop, lambda: None)


def never() -> LogProbs:
    raise AssertionError("computed again")


def batch_of(data: PreparedData, plan: int | str, rows: range) -> MicroBatch:
    return collate([data.row(plan, i) for i in rows], data.info.padding_id)


def test_d3_what_was_computed_once_is_what_each_step_would_compute(tmp_path: Path) -> None:
    data = prepared(tmp_path)
    asked = online()
    recorded = RecordedPairwise(recorder(data).recorded(lambda: asked.reference_log_probs), Preference())
    for plan in (0, 1, VALIDATION):
        for first in range(data.rows(plan)):
            batch = batch_of(data, plan, range(first, min(first + 3, data.rows(plan))))
            then, now = recorded.reference_log_probs(batch), asked.reference_log_probs(batch)
            assert float((then - now).abs().max()) < 1e-5
            assert then.unique().numel() == len(then), "each answer has its own"
    as_in_the_first_step = batch_of(data, 0, range(2))
    assert torch.equal(*(each.reference_log_probs(as_in_the_first_step) for each in (recorded, asked)))


def test_d3_it_is_found_again_whatever_the_rows_and_the_model_is_freed(tmp_path: Path) -> None:
    data = prepared(tmp_path / "one")
    networks = []

    def load() -> LogProbs:
        network = model()
        networks.append(weakref.ref(network))
        return Pairwise(lambda batch: forward(network, batch), Preference()).reference_log_probs

    first = recorder(data).recorded(load)
    gc.collect()
    assert [each() for each in networks] == [None]
    assert manifest.verify(tmp_path / "volume" / "dpo" / "reference").kind == "reference"
    other_rows = prepared(tmp_path / "other", epochs=1)
    again = recorder(other_rows).recorded(never)
    batch = batch_of(other_rows, 0, range(9))
    assert torch.equal(first(batch), again(batch))
    remove(tmp_path / "volume" / "dpo")
    with pytest.raises(AssertionError, match="computed again"):
        recorder(data).recorded(never)


def test_d3_other_weights_precision_or_answers_are_another_key(tmp_path: Path) -> None:
    data = prepared(tmp_path / "one")
    key = content_key(config(), data)
    other = Artifact(uri=START.uri, digest="sha256:" + "6" * 64)
    assert content_key(config(reference=other), data) != key
    assert content_key(config(precision="bf16"), data) != key
    assert content_key(config(), prepared(tmp_path / "two", seed=1)) != key
    recorder(data).recorded(lambda: online().reference_log_probs)
    with pytest.raises(AssertionError, match="computed again"):
        recorder(data, reference=other).recorded(never)


def test_d3_another_template_or_truncation_is_another_key(tmp_path: Path) -> None:
    chat = kit.write_jsonl(tmp_path / "chat.jsonl", kit.chats(20)).as_uri()
    rows = [{"prompt": f"{i}?", "chosen": f"It is {i}. " * 9, "rejected": "No."} for i in range(9)]
    pairs = kit.write_jsonl(tmp_path / "pairs.jsonl", rows).as_uri()

    def key(template: str | None = None, **changes: object) -> str:
        training = {"vocabularySize": 300, "chatTemplate": template}
        dpo = kit.stage("dpo", "dpo", pairs, fromStage="chat", loss="completion", onTooLong="truncate", **changes)
        report = kit.run(tmp_path, kit.sft(chat), dpo, model={"config": kit.TINY, "tokenizerTrain": training})
        return content_key(config(), kit.opened(tmp_path, report, 1))

    plain = "{% for m in messages %}{{ m.role ~ ': ' ~ m.content ~ '<|end|>' }}{% endfor %}"
    plain += "{% if add_generation_prompt %}assistant: {% endif %}"
    first = key()
    assert key(packing=False, recipe={"seed": 3}) == first, "rows are no part of it"
    assert len({first, key(plain), key(maxLength=32)}) == 3


def test_damaged_numbers_are_computed_again(tmp_path: Path) -> None:
    data = prepared(tmp_path)
    first = recorder(data).recorded(lambda: online().reference_log_probs)
    file = tmp_path / "volume" / "dpo" / "reference" / "log_probs.npy"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    again = recorder(data).recorded(lambda: online().reference_log_probs)
    batch = batch_of(data, 0, range(9))
    assert torch.equal(first(batch), again(batch))
    manifest.verify(file.parent)


def test_a_stop_in_the_middle_keeps_what_is_done(tmp_path: Path) -> None:
    data = prepared(tmp_path)
    asked: list[int] = []

    def counted() -> LogProbs:
        reference = online()

        def count(batch: MicroBatch) -> torch.Tensor:
            asked.extend(batch.record_ids)
            return reference.reference_log_probs(batch)

        return count

    stops = iter([False, True])
    with pytest.raises(Preempted, match="kept the reference's log-probabilities of 2 of 7 steps' rows"):
        recorder(data, lambda: next(stops)).recorded(counted)
    before = set(asked)
    values = recorder(data).recorded(counted)
    assert len(asked) == len(set(asked)) == data.text_count, "each answer once, over both attempts and both epochs"
    assert before < set(asked)
    batch = batch_of(data, 1, range(9))
    torch.testing.assert_close(values(batch), online().reference_log_probs(batch), atol=1e-5, rtol=0)


CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("setting", "epochs", "device", "lora", "expected"),
    [
        ("auto", 1, CPU, None, False),
        ("auto", 2, CPU, None, True),
        ("auto", 2, CPU, Lora(), True),
        ("auto", 1, CUDA, None, True),  # the copy would take more than a tenth of the accelerator
        ("auto", 1, CUDA, Lora(), False),  # there is no copy
        ("online", 2, CUDA, None, False),
        ("precomputed", 1, CPU, None, True),
    ],
)
def test_when_it_is_done(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    setting: str,
    epochs: int,
    device: torch.device,
    lora: Lora | None,
    expected: bool,
) -> None:
    start = tmp_path / "volume" / "start"
    start.mkdir(parents=True)
    (start / "model.safetensors").write_bytes(b"\0" * 1001)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=10_000))
    changed = config(preference=Preference(reference_log_probs=setting), lora=lora)
    assert pays(changed, prepared(tmp_path, epochs), device) is expected
    (start / "model.safetensors").write_bytes(b"\0" * 1000)
    if expected and device is CUDA:
        assert not pays(changed, prepared(tmp_path, epochs, seed=1), device)
