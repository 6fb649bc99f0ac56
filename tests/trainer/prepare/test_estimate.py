"""Memory and time against numbers worked out by hand, and the directions in which they must move."""

from collections.abc import Iterator
from typing import Any

import pytest
from tests.trainer.prepare.kit import TINY
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from trimtab_trainer.config import PrepareStage
from trimtab_trainer.errors import BadConfiguration
from trimtab_trainer.prepare.activations import Activations, count_activations
from trimtab_trainer.prepare.estimate import seconds
from trimtab_trainer.prepare.memory import RUNTIME, engine_memory, process_memory
from trimtab_trainer.prepare.shape import ModelShape, model_shape
from trimtab_trainer.settings import Precision

SHAPE = ModelShape(parameters=1000, layers=2, hidden=10, key_value=4, feed_forward=20, vocabulary=50)
ROW = Activations(layer=10_000, rest=1_000)
"""21,000 bytes a row."""


def _stage(**fields: Any) -> PrepareStage:
    return PrepareStage.model_validate(
        {"name": "s", "type": "sft", "data": [{"uri": "file:///x"}], "maxLength": 8, "precision": "fp32", **fields}
    )


def _bytes(shape: ModelShape = SHAPE, row: Activations = ROW, **fields: Any) -> int:
    """Of one process, on an accelerator, where publishing takes none."""
    one = {"recipe": {"globalBatchSize": 1}, "accelerator": True}
    return process_memory(_stage(**{**one, **fields}), shape, row, 8).peak - RUNTIME


def test_memory_in_fp32_by_hand() -> None:
    # weights 4 and AdamW 8 bytes a parameter: 12,000; head: 12 * 8 * 50 of logits and 4 * 50 * 10 of its gradient
    assert _bytes() == 12_000 + 21_000 + 4_800 + 2_000
    # the first micro-batch's gradients wait for the second
    assert _bytes(recipe={"globalBatchSize": 2}) == 12_000 + 21_000 + 4_800 + 2_000 + 4_000
    # two rows at once
    assert _bytes(recipe={"globalBatchSize": 2, "microBatchSize": 2}) == 12_000 + 2 * (21_000 + 4_800) + 2_000
    assert _bytes(accelerator=False) == 12_000 + 29_400 + 4_800 + 2_000, "with the heap's holes"


def test_memory_of_the_optimiser_by_hand() -> None:
    # few activations: the update needs most; gradients 4 and their copy 4
    small = Activations(layer=10, rest=0)
    assert _bytes(row=small) == 12_000 + 8_000
    # bf16 at ZeRO 2 on 4: weights 2; master and AdamW 12 / 4; then gradients, their copy and 2 temporaries 16 / 4
    assert _bytes(row=small, precision="bf16", zeroStage=2, worldSize=4) == 2_000 + 3_000 + max(4_000, 1_000 + 7_000)


def test_zero_3_updates_a_part_at_a_time() -> None:
    """Of 7e9 weights on 2, 3.5e9 each: the flat gradients and temporaries of 1e9 of them."""
    engine = engine_memory(_stage(zeroStage=3, worldSize=2, precision="bf16"), 7 * 10**9, 7 * 10**9)
    assert engine.update == 12e9
    assert engine_memory(_stage(zeroStage=2, worldSize=2, precision="bf16"), 7 * 10**9, 7 * 10**9).update == 16 * 3.5e9


def test_memory_with_references_by_hand() -> None:
    plain = _bytes(type="sft")
    assert _bytes(type="dpo") == plain + 4_000
    assert _bytes(type="dpo", recipe={"epochs": 2, "globalBatchSize": 1}) == plain, "computed before the first step"
    # critic: 12,000, its gradients, and the frozen models' weights
    four = plain + 12_000 + 4_000 + 8_000
    assert _bytes(type="ppo") == four
    assert _bytes(type="ppo", ppo={"verifier": {"exactMatch": {}}}) == four - 4_000
    assert _bytes(type="ppo", rewardStage="score", heldOutRewardStage="watch") == four + 4_000


def test_memory_of_an_adapter_by_hand() -> None:
    shape = SHAPE.model_copy(update={"adaptable": {"q_proj": 40, "down_proj": 60}})
    # 2 * 100 more weights: 4 * 1,200, AdamW 8 * 200; no gradient of the head
    assert _bytes(shape, lora={"rank": 2}) == 4_800 + 1_600 + 21_000 + 4_800
    # on a CPU with the heap's holes
    assert _bytes(shape, lora={"rank": 2}, accelerator=False) == 4_800 + 1_600 + 36_750 + 4_800
    assert _bytes(shape, lora={"rank": 2}, type="dpo") == 4_800 + 1_600 + 21_000 + 4_800, "no second copy"
    # critic: 4,800 + 1,600, its gradients 800, and the reward model's weights
    policy = 4_800 + 1_600 + 21_000 + 4_800 + 4_800 + 1_600 + 800 + 4_000
    assert _bytes(shape, lora={"rank": 2}, type="ppo") == policy
    with pytest.raises(BadConfiguration, match="no linear layer named v_proj; they have down_proj, q_proj"):
        _bytes(shape, lora={"targets": ["v_proj"]})


def test_memory_of_4_bits_by_hand() -> None:
    shape = SHAPE.model_copy(update={"adaptable": {"q_proj": 40}, "linear": {"q_proj": 400, "v_proj": 100}})
    plain = _bytes(shape, lora={"rank": 2, "targets": ["q_proj"]})
    # 400 weights at 0.516 bytes in place of 4, and one of the two layers' whole while it is used
    assert plain - _bytes(shape, lora={"rank": 2, "targets": ["q_proj"], "quantization": "nf4"}) == round(
        400 * 3.484 - 800
    )


def test_memory_of_ppo_with_its_average_and_vllm_by_hand() -> None:
    plain = {"type": "ppo", "recipe": {"globalBatchSize": 6, "microBatchSize": 2, "optimizer": "sgd"}}
    base = _bytes(**plain, ppo={})
    assert _bytes(**plain, ppo={"ema": {}}) == base, "in host memory"
    on_cpu = {**plain, "accelerator": False}
    assert _bytes(**on_cpu, ppo={"ema": {}}) - _bytes(**on_cpu, ppo={}) == 4_000
    vllm = {"engine": "vllm"}
    # the accelerator's memory is not known: weights, and keys and values of 6 answers: 8 tokens * 8 bytes * 4 * 2
    assert _bytes(**plain, ppo={"rollout": vllm}) == base + 4_000 + 6 * 8 * 8 * 4 * 2
    known = {**plain, "processMemoryBytes": 10**6}
    assert _bytes(**known, ppo={"rollout": vllm}) == base + 300_000, "its share of 0.3"
    half = {"gpuMemoryUtilization": 0.5}
    assert _bytes(**known, ppo={"rollout": {**vllm, "vllm": half}}) == base + 500_000
    asleep = _bytes(**known, ppo={"rollout": {**vllm, "vllm": {**half, "sleep": True}}})
    # it is awake when nothing learns: between steps twice weights and an update's gradients that wait; no states of SGD
    assert base < asleep < base + 500_000


def test_publishing_takes_memory_of_the_cpu() -> None:
    none = Activations(layer=0, rest=0)
    plain = {"recipe": {"globalBatchSize": 1, "optimizer": "sgd"}}
    # gradients and their flat copy; or the weights copied and read back, and a little
    assert _bytes(row=none, **plain) == 4_000 + 8_000
    assert _bytes(row=none, **plain, accelerator=False) == 4_000 + 8_600


def test_seconds_by_hand() -> None:
    # 6 * 1000 + 6 * 2 * 10 * 8 = 6,960 operations a token
    assert seconds(_stage(), SHAPE, 10**9) == 46.4  # at 1.5e11 a second
    assert seconds(_stage(worldSize=2), SHAPE, 10**9) == 23.2
    assert seconds(_stage(accelerator=True, precision="bf16"), SHAPE, 10**12) == 17.4  # at 4e14
    assert seconds(_stage(recipe={"gradientCheckpointing": True}), SHAPE, 10**9) == pytest.approx(46.4 * 4 / 3)
    assert seconds(_stage(type="dpo"), SHAPE, 10**9) == pytest.approx(46.4 * 4 / 3)
    shape = SHAPE.model_copy(update={"adaptable": {"q_proj": 40, "down_proj": 60}})
    assert seconds(_stage(lora={"rank": 2}), shape, 10**9) == pytest.approx(5.36e12 / 1.5e11)  # 6,960 - 2 * 800


@pytest.mark.parametrize("world", [4, 8])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_is_sharded_shrinks(world: int, precision: str) -> None:
    huge = 40 * 10**9  # the buckets are small against it
    needs = [
        engine_memory(_stage(zeroStage=zero, worldSize=world, precision=precision), huge, huge).rest for zero in (1, 3)
    ]
    assert needs[1] < needs[0]


@pytest.fixture
def as_in_prepare() -> Iterator[None]:
    """The engine's attention, which other tests may have installed, is not in the process that estimates."""
    installed = AttentionInterface()["sdpa"]
    AttentionInterface.register("sdpa", sdpa_attention_forward)
    yield
    AttentionInterface.register("sdpa", installed)


@pytest.mark.usefixtures("as_in_prepare")
def test_activations_are_counted_on_the_model_itself() -> None:
    whole = count_activations({**TINY, "vocab_size": 100}, Precision.FP32, 64, checkpointing=False)
    # of a layer of h 32 and f 64, elements a token: 10 h in two norms and two residuals, q, k, v and attention's
    # answer, 4 f, and the mask of the attention, which has a number for each two tokens
    least = 64 * 4 * (8 * 32 + 4 * 64)
    assert least < whole.layer < 1.5 * least + 64 * 64 * 4
    twice = count_activations({**TINY, "vocab_size": 100}, Precision.FP32, 128, checkpointing=False)
    assert 2 * whole.layer < twice.layer < 4 * whole.layer, "the mask grows with the square"
    kept = count_activations({**TINY, "vocab_size": 100}, Precision.FP32, 64, checkpointing=True)
    assert kept.layer == 64 * 4 * 32, "what enters a layer"
    assert kept.rest > whole.layer, "one layer is computed again"
    half = count_activations({**TINY, "vocab_size": 100}, Precision.BF16, 64, checkpointing=False)
    assert 0.4 < half.layer / whole.layer < 0.7


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
