"""`python -m bench.trainer.ppo_peer WORKLOAD STEPS`: the side of TRL 1.12, the last with PPO, in turns.

Its defaults, but for fp32 and no gradient checkpointing, as on our side, and a temperature of 1.
"""

from __future__ import annotations

import sys
import tempfile
from typing import Any

from bench.trainer import data
from bench.trainer.peers import model_of, tokenizer_of
from bench.trainer.turns import Turns
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, TrainerCallback
from trl.experimental.ppo import PPOConfig, PPOTrainer


class AtTheTurns(TrainerCallback):
    """Between the steps."""

    def __init__(self, turns: Turns) -> None:
        self.turns = turns

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """All is set up."""
        self.turns.wait()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Tell of the step; the trainer does not tell its tokens."""
        self.turns.step_done(0, data.EPISODES)


def main() -> None:
    """Train until told to stop."""
    turns = Turns(int(sys.argv[2]))
    prompts = Dataset.from_list([{"input_ids": prompt} for prompt in data.prompts()])
    with tempfile.TemporaryDirectory() as folder:
        settings = PPOConfig(
            output_dir=folder,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            total_episodes=1_000_000,
            per_device_train_batch_size=data.PADDED,
            gradient_accumulation_steps=data.EPISODES // data.PADDED,
            learning_rate=data.LEARNING_RATE,
            lr_scheduler_type="constant",
            response_length=data.ANSWER,
            num_ppo_epochs=data.PASSES,
            temperature=1.0,
            stop_token="eos",  # noqa: S106
            num_sample_generations=0,
        )
        PPOTrainer(
            settings,
            tokenizer_of(padding_side="left"),
            model=model_of(AutoModelForCausalLM),
            ref_model=model_of(AutoModelForCausalLM),
            reward_model=model_of(AutoModelForSequenceClassification),
            value_model=model_of(AutoModelForSequenceClassification),
            train_dataset=prompts,
            eval_dataset=prompts,
            callbacks=[AtTheTurns(turns)],
        ).train()


if __name__ == "__main__":
    main()
