"""Sampling with vLLM, in the training processes themselves: each has an engine of its own with the whole model.

The engine starts with meaningless weights (`load_format="dummy"`) and gets those of the model in training before it
answers, whenever they have changed. A tensor that never arrives is seen at the first check (`rollout_check`); with the
stage's starting weights it would be right at first, and stale later.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import deepspeed
import numpy as np
import torch

from trimtab_trainer.config import TrainConfig
from trimtab_trainer.data.store import PreparedInfo, Row
from trimtab_trainer.engine.lora import is_transposed, merge, unmerged
from trimtab_trainer.engine.model import DTYPES
from trimtab_trainer.engine.rollout import Episode, episode, random_key
from trimtab_trainer.engine.setup import Engine
from trimtab_trainer.errors import BadConfiguration, TrainingFailed
from trimtab_trainer.ppo_settings import CPU_ROLLOUT_CACHE_BYTES, GPU_SHARE, Rollout
from trimtab_trainer.rollout_limits import check_rollout
from trimtab_trainer.volumes import local_path

_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the weights are handed over within the process
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_DO_NOT_TRACK": "1",
}
_ON_CPU = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the trainer's threads are the stage's to set
    "TORCH_COMPILE_DISABLE": "1",  # eager mode leaves functions compiled, and the first answer waits for them
}


class VllmSampler:
    """Answers all of a rank's prompts at once; see `Sampler`."""

    foreign = True

    def __init__(self, engine: Engine, config: TrainConfig, info: PreparedInfo, rollout: Rollout) -> None:
        """Start vLLM in every rank; collective. DeepSpeed's engines come before.

        Raises:
            BadConfiguration: vLLM is not installed, or can't run this model here.
        """
        if config.model is None:
            raise BadConfiguration("vLLM needs a model to start from; give from, or model.uri", stage=config.stage)
        check_rollout(rollout, config.stage, accelerator=engine.device.type != "cpu")
        self._engine, self._rollout = engine, rollout
        self._seed, self._end_id = config.recipe.seed, info.end_of_turn_id
        self._scaling = config.lora.scaling if config.lora else 1.0
        self._synced: int | None = None
        self._on_cpu = engine.device.type == "cpu"
        os.environ.update(_ENVIRONMENT | (_ON_CPU if self._on_cpu else {}))
        with _random_state_kept(engine.device):
            self._llm = self._start(local_path(config.model.uri), config, info)

    def sample(self, own: Sequence[Row], rows: int, stream: int, beat: Callable[[], None]) -> list[Episode]:
        """See `Sampler.sample`."""
        from vllm import SamplingParams

        with _random_state_kept(self._engine.device):
            self._synchronise()
            settings = [
                SamplingParams(
                    temperature=self._rollout.temperature,
                    max_tokens=self._rollout.max_new_tokens,
                    seed=int(np.random.SeedSequence(random_key(self._seed, stream, prompt)).generate_state(1)[0]),
                    stop_token_ids=[self._end_id],
                    ignore_eos=True,  # the model's own; the stage knows one end only
                    logprobs=0,  # of the sampled token
                    detokenize=False,
                )
                for prompt in own
            ]
            prompts = [{"prompt_token_ids": prompt.input_ids.tolist()} for prompt in own]
            answers = self._llm.generate(prompts, settings, use_tqdm=False) if own else []
            if self._rollout.vllm.sleep:
                self._llm.sleep(level=2)  # nothing is kept: neither weights nor cache
                self._synced = None
        beat()
        return [self._episode(*each) for each in zip(own, answers, strict=True)]

    def _start(self, model: os.PathLike[str], config: TrainConfig, info: PreparedInfo) -> Any:
        vllm = self._rollout.vllm
        on_cpu: dict[str, Any] = {"kv_cache_memory_bytes": CPU_ROLLOUT_CACHE_BYTES, "enforce_eager": True}
        on_gpu: dict[str, Any] = {
            "gpu_memory_utilization": vllm.gpu_memory_utilization or GPU_SHARE,
            "enable_sleep_mode": vllm.sleep,
        }
        try:
            from vllm import LLM

            return LLM(
                model=os.fspath(model),
                load_format="dummy",
                dtype=str(DTYPES[config.precision]).removeprefix("torch."),
                distributed_executor_backend="external_launcher",  # this process's device, and its group of one
                max_model_len=info.max_length,
                skip_tokenizer_init=True,
                generation_config="vllm",  # not the model's own top-p and top-k
                logprobs_mode="processed_logprobs",  # at the temperature
                seed=config.recipe.seed,
                **(on_cpu if self._on_cpu else on_gpu),
            )
        except (ValueError, NotImplementedError) as error:
            cause = " ".join(str(error).split())[:500]
            raise BadConfiguration(
                f"vLLM can't run this model here: {cause}; set ppo.rollout.engine: transformers, or, where memory is "
                "short, change ppo.rollout.vllm.gpuMemoryUtilization",
                stage=config.stage,
            ) from error

    def _synchronise(self) -> None:
        """Give vLLM the weights of the model in training, where it has others."""
        version = self._engine.deepspeed.global_steps
        if self._synced == version:
            return
        if self._rollout.vllm.sleep:
            self._llm.wake_up(tags=["weights"])
        self._load()
        if self._rollout.vllm.sleep:
            self._llm.wake_up(tags=["kv_cache"])
        if not self._llm.reset_prefix_cache():  # it holds what the old weights made of these prompts
            raise TrainingFailed("vLLM did not empty its prefix cache", reason="RolloutOutOfSync")
        self._synced = version

    def _load(self) -> None:
        pairs = present_tensors(self._engine, self._scaling)
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": pairs})

    def _episode(self, prompt: Row, answer: Any) -> Episode:
        found = answer.outputs[0]
        tokens = np.array(found.token_ids, dtype=np.int32)
        log_probs = [step[token].logprob for step, token in zip(found.logprobs, found.token_ids, strict=True)]
        return episode(prompt, tokens, self._end_id, np.array(log_probs, dtype=np.float32))


def present_tensors(engine: Engine, scaling: float) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter and persistent buffer, whole while it is at hand; a tied one under each of its names.

    An adapter is merged into each of its targets on the way; the weights in training stay as they are.

    Args:
        engine: of the model in training.
        scaling: of its adapter, if it has one.
    """
    module = engine.module
    sharded = engine.deepspeed.zero_optimization_stage() == 3
    transposed = is_transposed(module)
    for name, parts in unmerged(dict(module.named_parameters(remove_duplicate=False))):
        with deepspeed.zero.GatheredParameters(parts, enabled=sharded):
            yield name, merge([part.detach() for part in parts], scaling, transposed=transposed)
    persistent = module.state_dict().keys()
    yield from ((name, buffer) for name, buffer in module.named_buffers() if name in persistent)


@contextmanager
def _random_state_kept(device: torch.device) -> Iterator[None]:
    """Keep the trainer's random numbers: vLLM seeds and draws from the process's generators."""
    kept = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(kept[0])
            np.random.set_state(kept[1])
