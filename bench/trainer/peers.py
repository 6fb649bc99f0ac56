"""`python -m bench.trainer.peers WORKLOAD STEPS`: TRL's side of a benchmark, in turns; in an environment of its own.

Workloads: `sft`, `sft-packed`, `dpo`, `pairs`. TRL's defaults but for what would change the arithmetic: fp32 and no
gradient checkpointing, as on our side; and its progress bar is off.
"""

from __future__ import annotations

import sys
import tempfile
from itertools import combinations
from typing import Any

import torch
from bench.trainer import data
from bench.trainer.turns import Turns
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
    TrainerCallback,
)
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer


def tokenizer_of(**settings: Any) -> PreTrainedTokenizerFast:
    """One word a token."""
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(data.VOCABULARY)}, unk_token="w3"))  # noqa: S106
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        eos_token=f"w{data.END}",
        pad_token=f"w{data.PADDING}",
        unk_token="w3",  # noqa: S106
        **settings,
    )


def model_of(kind: Any) -> Any:
    """With random weights, the same ones each time."""
    torch.manual_seed(0)
    settings = AutoConfig.for_model(**data.MODEL, num_labels=1, pad_token_id=data.PADDING)
    return kind.from_config(settings, attn_implementation="sdpa")


def words(ids: list[int]) -> str:
    """A text that the tokenizer takes apart into these ids."""
    return " ".join(f"w{i}" for i in ids)


def texts_of(workload: str) -> list[dict[str, Any]]:
    """Rows of the data set, as TRL documents them."""
    if workload.startswith("sft"):
        return [
            {
                "input_ids": text.prompt + text.answers[0],
                "completion_mask": [0] * len(text.prompt) + [1] * len(text.answers[0]),
            }
            for text in data.texts(4000, 1)
        ]
    answers = 2 if workload == "dpo" else 4
    # TRL adds the end token itself
    return [
        {"prompt": words(text.prompt), "chosen": " " + words(chosen[:-1]), "rejected": " " + words(rejected[:-1])}
        for text in data.texts(4000 // answers, answers)
        for chosen, rejected in combinations(text.answers, 2)
    ]


def counted(kind: Any) -> Any:
    """The trainer, which counts what it is given."""

    class Counted(kind):
        tokens = texts = 0

        def training_step(self, model: Any, inputs: dict[str, Any], *others: Any) -> torch.Tensor:
            mask = inputs.get("attention_mask")
            positions = inputs.get("position_ids")
            self.tokens = int(mask.sum()) if mask is not None else inputs["input_ids"].numel()
            self.texts = int((positions == 0).sum()) if positions is not None else len(inputs["input_ids"])
            return super().training_step(model, inputs, *others)

    return Counted


class AtTheTurns(TrainerCallback):
    """Between the steps."""

    def __init__(self, turns: Turns) -> None:
        self.turns, self.trainer, self.sets = turns, None, 1.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """All is set up."""
        self.turns.wait()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Tell of the step."""
        self.turns.step_done(self.trainer.tokens, self.trainer.texts * self.sets)


def main() -> None:
    """Train until told to stop."""
    workload, steps = sys.argv[1], int(sys.argv[2])
    turns = Turns(steps)
    callback = AtTheTurns(turns)
    with tempfile.TemporaryDirectory() as folder:
        common = {
            "output_dir": folder,
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            "max_steps": 1_000_000,
            "learning_rate": data.LEARNING_RATE,
            "lr_scheduler_type": "constant",
            "max_length": data.MAX_LENGTH,
        }
        rows = {"train_dataset": Dataset.from_list(texts_of(workload)), "processing_class": tokenizer_of()}
        callbacks = [callback]
        if workload == "sft":
            settings = SFTConfig(**common, completion_only_loss=True)
            trainer = counted(SFTTrainer)(model_of(AutoModelForCausalLM), settings, callbacks=callbacks, **rows)
        elif workload == "sft-packed":
            packed = {**common, "max_length": data.ROW, "packing": True, "per_device_train_batch_size": 1}
            settings = SFTConfig(**packed, completion_only_loss=True)
            trainer = counted(SFTTrainer)(model_of(AutoModelForCausalLM), settings, callbacks=callbacks, **rows)
        elif workload == "dpo":
            models = {"model": model_of(AutoModelForCausalLM), "ref_model": model_of(AutoModelForCausalLM)}
            trainer = counted(DPOTrainer)(args=DPOConfig(**common), callbacks=callbacks, **models, **rows)
            callback.sets = 0.5
        else:
            model = model_of(AutoModelForSequenceClassification)
            trainer = counted(RewardTrainer)(model, RewardConfig(**common), callbacks=callbacks, **rows)
            callback.sets = 0.5 / 6
        callback.trainer = trainer
        trainer.train()


if __name__ == "__main__":
    main()
