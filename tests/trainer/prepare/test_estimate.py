"""Memory and time against numbers worked out by hand, and the directions in which they must move."""

from typing import Any

import pytest
from tests.trainer.prepare.kit import TINY

from trimtab_trainer.config import PrepareStage
from trimtab_trainer.errors import BadConfiguration
from trimtab_trainer.prepare.estimate import ModelShape, estimate, model_shape

SHAPE = ModelShape(parameters=1000, layers=2, hidden=10, key_value=4, feed_forward=20, vocabulary=50)


def _stage(**fields: Any) -> PrepareStage:
    return PrepareStage.model_validate(
        {"name": "s", "type": "sft", "data": [{"uri": "file:///x"}], "maxLength": 8, "precision": "fp32", **fields}
    )


def test_memory_in_fp32_by_hand() -> None:
    # weights 4, gradients 4, AdamW 8 bytes a parameter: 16,000
    # activations: 4 bytes * 8 tokens * 2 layers * (80 + 8 + 80) = 10,752; logits: 8 * 50 * (4 + 8) = 4,800
    assert estimate(_stage(), SHAPE, 0).memory_bytes == 31_552


def test_memory_and_time_with_a_reference_by_hand() -> None:
    # twice the tokens: activations 21,504, logits 9,600; of the reference weights 4,000, logits 16 * 50 * 8 = 6,400
    stage = _stage(type="dpo")
    assert estimate(stage, SHAPE, 0).memory_bytes == 16_000 + 21_504 + 9_600 + 4_000 + 6_400
    assert estimate(stage, SHAPE, 10**9).seconds == 62  # 46.4 and a third


def test_memory_and_time_of_an_adapter_by_hand() -> None:
    shape = SHAPE.model_copy(update={"adaptable": {"q_proj": 40, "down_proj": 60}})
    # 2 * 100 more weights: 4 * 1,200; gradients and AdamW 12 * 200; activations 10,752 and logits 4,800 as without
    stage = _stage(lora={"rank": 2})
    assert estimate(stage, shape, 0).memory_bytes == 4_800 + 2_400 + 10_752 + 4_800
    assert estimate(stage, shape, 10**9).seconds == 36  # 6,960 - 2 * 800 operations a token
    one = _stage(lora={"rank": 2, "targets": ["q_proj"]})
    assert estimate(one, shape, 0).memory_bytes == 16 * 80 + 4_000 + 10_752 + 4_800
    with pytest.raises(BadConfiguration, match="no linear layer named v_proj; they have down_proj, q_proj"):
        estimate(_stage(lora={"targets": ["v_proj"]}), shape, 0)


def test_an_adapters_reference_is_no_second_copy_of_the_model() -> None:
    shape = SHAPE.model_copy(update={"adaptable": {"q_proj": 40}})
    adapter, whole = ({"lora": {"rank": 2}}, {})
    of_dpo, of_sft = (
        [estimate(_stage(type=kind, maxLength=length, **fields), shape, 0).memory_bytes for fields in (adapter, whole)]
        for kind, length in (("dpo", 8), ("sft", 16))
    )
    # the reference's logits, 16 * 50 * 8, and with all weights trained 4,000 of a copy
    assert [one - other for one, other in zip(of_dpo, of_sft, strict=True)] == [6_400, 10_400]


def test_memory_in_bf16_at_zero_2_by_hand() -> None:
    # weights 2,000; gradients 4,000 / 4; master copy and AdamW 12,000 / 4: 6,000
    # activations: 2 * 8 * 2 * 168 = 5,376; logits: 8 * 50 * (2 + 8) = 4,000
    stage = _stage(precision="bf16", zeroStage=2, worldSize=4)
    assert estimate(stage, SHAPE, 0).memory_bytes == 15_376


def test_memory_with_checkpointing_and_sgd_by_hand() -> None:
    # weights and gradients 8,000; activations 4 * 8 * (2 * 10 + 168) = 6,016; logits 4,800
    stage = _stage(recipe={"optimizer": "sgd", "gradientCheckpointing": True})
    assert estimate(stage, SHAPE, 0).memory_bytes == 18_816


def test_seconds_by_hand() -> None:
    # 6 * 1000 + 6 * 2 * 10 * 8 = 6,960 operations a token
    assert estimate(_stage(), SHAPE, 10**9).seconds == 47  # 46.4 at 1.5e11 a second
    assert estimate(_stage(worldSize=2), SHAPE, 10**9).seconds == 24
    assert estimate(_stage(accelerator=True, precision="bf16"), SHAPE, 10**12).seconds == 18  # 17.4 at 4e14
    assert estimate(_stage(recipe={"gradientCheckpointing": True}), SHAPE, 10**9).seconds == 62


@pytest.mark.parametrize("world", [2, 8])
def test_zero_stages_never_need_more(world: int) -> None:
    needs = [estimate(_stage(zeroStage=zero, worldSize=world), SHAPE, 0).memory_bytes for zero in range(4)]
    assert needs == sorted(needs, reverse=True)
    assert len(set(needs)) == 4
    fixed = needs[3] - 10_752 - 4_800
    assert fixed == 16_000 // world


@pytest.mark.parametrize(
    "field", [{"maxLength": 16}, {"recipe": {"microBatchSize": 2}}, {"precision": "bf16", "maxLength": 99}]
)
def test_more_tokens_at_once_need_more(field: dict[str, Any]) -> None:
    assert estimate(_stage(**field), SHAPE, 0).memory_bytes > estimate(_stage(), SHAPE, 0).memory_bytes


def test_parameters_are_counted_without_memory() -> None:
    # embedding and head 2 * 100 * 32; a layer: 4 * 32 * 32 attention, 3 * 32 * 64 MLP, 2 * 32 norms; a last norm
    shape = model_shape({**TINY, "vocab_size": 100})
    assert shape.parameters == 2 * 100 * 32 + 2 * (4 * 32 * 32 + 3 * 32 * 64 + 2 * 32) + 32
    assert (shape.layers, shape.hidden, shape.key_value, shape.feed_forward, shape.vocabulary) == (2, 32, 32, 64, 100)
    assert shape.adaptable == {
        **dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), 2 * 64),
        **dict.fromkeys(("gate_proj", "up_proj", "down_proj"), 2 * 96),
    }
    huge = {"model_type": "llama", "hidden_size": 8192, "num_hidden_layers": 80, "intermediate_size": 28672}
    assert model_shape({**huge, "num_attention_heads": 64, "num_key_value_heads": 8}).parameters > 6e10


def test_an_impossible_model_is_refused() -> None:
    with pytest.raises(BadConfiguration, match=r"model config \(llama\): .*correct the config"):
        model_shape({**TINY, "hidden_size": "wide"})
