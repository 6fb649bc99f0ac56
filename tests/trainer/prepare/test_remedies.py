"""Which settings make a stage fit: the order in which they are tried, and that what is named really fits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.trainer.prepare.kit import chats, run, sft, write_jsonl

from trimtab_trainer.config import PrepareStage
from trimtab_trainer.errors import BadConfiguration
from trimtab_trainer.prepare.activations import Activations
from trimtab_trainer.prepare.memory import process_memory
from trimtab_trainer.prepare.remedies import CONTEXT, IMPORTS, REASON, find_remedy, require_fit
from trimtab_trainer.prepare.shape import ModelShape

SHAPE = ModelShape(
    parameters=10**9, layers=20, hidden=2048, key_value=512, feed_forward=5504, vocabulary=32_000,
    adaptable={"q_proj": 20 * 4096}, linear={"q_proj": 20 * 2048 * 2048},
)  # fmt: skip
GIB = 2**30


def stage(**fields: Any) -> PrepareStage:
    """One of 4 processes with accelerators."""
    given = {"name": "s", "type": "sft", "data": [{"uri": "file:///x"}], "maxLength": 2048, "worldSize": 4}
    return PrepareStage.model_validate({**given, "accelerator": True, **fields})


def need(stage: PrepareStage) -> int:
    """The estimate, with activations that grow with the row, of which checkpointing keeps a tenth."""
    row = stage.max_length
    kept = 10 if stage.recipe.gradient_checkpointing else 1
    return process_memory(stage, SHAPE, Activations(layer=row * 60_000 // kept, rest=row * 80_000), row).peak


def remedy(limit: int, *, from_weights: bool = True, **fields: Any) -> dict[str, str] | None:
    found = find_remedy(stage(**fields), limit, need, from_weights=from_weights)
    return None if found is None else dict(found.settings)


def apply(settings: dict[str, str], fields: dict[str, Any]) -> PrepareStage:
    """As a person does it who reads the message."""
    recipe = dict(fields.get("recipe", {}))
    changed = dict(fields)
    for path, value in settings.items():
        match path:
            case "train.microBatchSize":
                recipe["microBatchSize"] = int(value)
            case "train.gradientCheckpointing":
                recipe["gradientCheckpointing"] = value == "true"
            case "parallelism.zeroStage":
                changed["zeroStage"] = int(value)
            case "lora":
                changed["lora"] = {}
            case "ppo.rollout.vllm.sleep":
                changed["ppo"] = {"rollout": {"engine": "vllm", "vllm": {"sleep": True}}}
            case _:
                assert path == f"{changed.get('type', 'sft')}.maxLength"
                changed["maxLength"] = int(value)
    return stage(**{**changed, "recipe": recipe})


@given(
    micro=st.sampled_from([1, 2, 3, 8, 32]),
    zero=st.integers(0, 3),
    world=st.sampled_from([1, 2, 8]),
    checkpointing=st.booleans(),
    kind=st.sampled_from(["pretrain", "sft", "reward", "dpo", "ppo"]),
    vllm=st.booleans(),
    accelerator=st.booleans(),
    from_weights=st.booleans(),
    limit=st.integers(1, 60),
)
@settings(max_examples=200)
def test_what_is_named_really_fits(
    micro: int, zero: int, world: int, checkpointing: bool, kind: str, vllm: bool, accelerator: bool,
    from_weights: bool, limit: int,
) -> None:  # fmt: skip
    recipe = {"globalBatchSize": 64, "microBatchSize": micro, "gradientCheckpointing": checkpointing}
    fields: dict[str, Any] = {"type": kind, "recipe": recipe, "zeroStage": zero, "worldSize": world}
    fields |= {"accelerator": accelerator, "processMemoryBytes": limit * GIB}
    if kind == "ppo":
        fields["ppo"] = {"rollout": {"engine": "vllm" if vllm else "transformers"}}
    asked = stage(**fields)
    room = limit * GIB - (CONTEXT if accelerator else IMPORTS)
    if need(asked) <= room:
        require_fit(asked, need(asked), need, from_weights=from_weights)
        return
    found = find_remedy(asked, room, need, from_weights=from_weights)
    with pytest.raises(BadConfiguration, match=r"a process needs .* of memory") as refused:
        require_fit(asked, need(asked), need, from_weights=from_weights)
    assert refused.value.reason == REASON
    if found is None:
        assert "none of the stage's settings makes it fit" in refused.value.message
        hardest = {**recipe, "microBatchSize": 1, "gradientCheckpointing": True}
        last = stage(**{**fields, "recipe": hardest, "zeroStage": 3 if world > 1 else zero, "maxLength": 256})
        assert kind == "ppo" or need(last) > room, "nothing that is tried fits"
        return
    changed = apply(dict(found.settings), fields)
    assert need(changed) == found.memory_bytes <= room
    assert str(found) in refused.value.message
    assert from_weights or "lora" not in found.settings


def test_the_order() -> None:
    """What changes only the speed comes first, the largest micro-batch that fits; then adapters; then length."""
    many = {"recipe": {"globalBatchSize": 64, "microBatchSize": 16}, "zeroStage": 2}
    states = need(stage(recipe={"globalBatchSize": 64, "microBatchSize": 1}, zeroStage=2))
    assert remedy(need(stage(**many)) - 1, **many) == {"train.microBatchSize": "8"}
    one = {"recipe": {"globalBatchSize": 64}, "zeroStage": 2}
    assert remedy(states - 1, **one) == {"train.gradientCheckpointing": "true"}
    replicated = {"recipe": {"globalBatchSize": 64, "gradientCheckpointing": True}}
    limit = need(stage(**replicated, zeroStage=2)) + 1
    assert remedy(limit, **replicated) == {"parallelism.zeroStage": "2"}
    alone = {"recipe": {"globalBatchSize": 64, "gradientCheckpointing": True}, "worldSize": 1}
    assert remedy(10 * GIB, **alone) == {"lora": "{}"}
    assert remedy(10 * GIB, **alone, from_weights=False) is None, "random weights are no start for an adapter"
    adapter = {**alone, "lora": {}}
    floor = need(stage(**{**adapter, "maxLength": 512}))
    assert remedy(floor, **adapter) == {"sft.maxLength": "512"}
    assert remedy(floor, **adapter, type="pretrain") == {"pretrain.maxLength": "512"}


def test_more_processes_are_named_where_the_result_would_change() -> None:
    """What is left to shard is the states: of 4 processes each has a fourth, of 8 an eighth."""
    hardest = {"recipe": {"globalBatchSize": 64, "gradientCheckpointing": True}, "zeroStage": 3}
    limit = need(stage(**hardest, worldSize=8))
    asked = stage(**hardest, processMemoryBytes=limit + CONTEXT)
    with pytest.raises(
        BadConfiguration, match=r"; set lora: \{\}: then it needs .*; or take 2 times as many processes"
    ):
        require_fit(asked, need(asked), need, from_weights=True)
    replicated = {**hardest, "zeroStage": 0, "worldSize": 1}
    asked = stage(**replicated, processMemoryBytes=limit + CONTEXT)
    with pytest.raises(BadConfiguration, match=r"; or take 8 times as many .* and parallelism.zeroStage: 3$"):
        require_fit(asked, need(asked), need, from_weights=True)


def test_vllm_sleeps_where_it_can() -> None:
    ppo = {"type": "ppo", "processMemoryBytes": 80 * GIB, "worldSize": 1, "recipe": {"globalBatchSize": 8}}
    ppo["ppo"] = {"rollout": {"engine": "vllm", "vllm": {"gpuMemoryUtilization": 0.5}}}
    asleep = {"rollout": {"engine": "vllm", "vllm": {"gpuMemoryUtilization": 0.5, "sleep": True}}}
    limit = need(stage(**{**ppo, "ppo": asleep}))
    assert need(stage(**ppo)) - limit > 9 * GIB, "its share is free while the models learn"
    assert remedy(limit, **ppo) == {"ppo.rollout.vllm.sleep": "true"}
    assert remedy(limit, **{**ppo, "accelerator": False}) != {"ppo.rollout.vllm.sleep": "true"}


def test_prepare_refuses_what_does_not_fit_and_takes_its_own_advice(tmp_path: Path) -> None:
    data, root = write_jsonl(tmp_path / "chat.jsonl", chats(200)), tmp_path / "root"
    asked = {"recipe": {"globalBatchSize": 64, "microBatchSize": 64}}
    needs = run(root, sft(data.as_uri(), **asked)).stages[0].memory_bytes
    small = {**asked, "processMemoryBytes": IMPORTS + needs - 1}
    with pytest.raises(BadConfiguration, match=r"^stage chat: a process needs .* and resources.limits.memory leaves .*"
                       r"; set train.microBatchSize: 32: then it needs") as refused:  # fmt: skip
        run(root, sft(data.as_uri(), **small))
    assert (refused.value.reason, refused.value.stage) == (REASON, "chat")
    run(root, sft(data.as_uri(), **{**small, "recipe": {"globalBatchSize": 64, "microBatchSize": 32}}))
    with pytest.raises(BadConfiguration, match=r"none of the stage's settings makes it fit: give it more memory$"):
        run(root, sft(data.as_uri(), **{**asked, "processMemoryBytes": IMPORTS}))


def test_autotune_is_judged_by_the_least_that_it_may_choose(tmp_path: Path) -> None:
    data, root = write_jsonl(tmp_path / "chat.jsonl", chats(200)), tmp_path / "root"
    least = (
        run(root, sft(data.as_uri(), worldSize=2, zeroStage=3, recipe={"globalBatchSize": 64})).stages[0].memory_bytes
    )
    asked = {"autotune": True, "worldSize": 2, "recipe": {"globalBatchSize": 64}}
    assert run(root, sft(data.as_uri(), **asked)).stages[0].memory_bytes == least
    with pytest.raises(
        BadConfiguration, match=r"train.autotune measures with the whole model in one process: it needs"
    ):
        run(root, sft(data.as_uri(), **asked, processMemoryBytes=IMPORTS))
