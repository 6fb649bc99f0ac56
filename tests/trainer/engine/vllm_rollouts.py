"""Run by torchrun: what `test_vllm_rollout` asks of one life of vLLM beside the model in training; answers go to files.

Arguments: the root that the test has filled, the precision, the ZeRO stage, and the rank of the adapter or 0.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tests.trainer.engine.stages import stage

from trimtab_trainer.config import Artifact
from trimtab_trainer.data.store import PreparedData, Row
from trimtab_trainer.engine.batches import plan_steps
from trimtab_trainer.engine.build import build_loop
from trimtab_trainer.engine.distributed import Group
from trimtab_trainer.engine.experience import Experience
from trimtab_trainer.engine.model import load_model
from trimtab_trainer.engine.ppo import PpoLoop
from trimtab_trainer.engine.rollout_vllm import VllmSampler
from trimtab_trainer.engine.setup import Engine
from trimtab_trainer.errors import TrainingFailed
from trimtab_trainer.ppo_settings import Ppo, Rollout, RolloutEngine
from trimtab_trainer.settings import Lora
from trimtab_trainer.supervisor.fence import Fence
from trimtab_trainer.volumes import local_path

ROWS, BATCH, LENGTH = 9, 5, 256
TEMPERATURE = 0.7


def largest(found: list[Experience]) -> float:
    """Largest difference of a token's log-probability, in nats."""
    pairs = ((each.log_probs.detach().numpy(), each.episode.log_probs) for each in found)
    return max((float(np.abs(one - other).max()) for one, other in pairs if other is not None), default=0.0)


def failure(act: Any) -> list[str]:
    try:
        act()
    except TrainingFailed as error:
        return [error.reason, error.message]
    return []


def ask(loop: PpoLoop, sampler: VllmSampler, group: Group) -> dict[str, Any]:
    judge = loop._judge
    steps = list(plan_steps([ROWS, ROWS], BATCH, 4))

    def answer() -> list[Experience]:
        return judge.answer(0, 0, ROWS, 0)

    told: dict[str, Any] = {}
    state = torch.get_rng_state()
    first, again = answer(), answer()
    told["random_state_kept"] = torch.equal(state, torch.get_rng_state())
    told["largest"], told["difference"] = largest(first), judge.told["rollout_difference"]
    told["answers"] = [each.episode.row.input_ids.tolist() for each in first]
    same = (np.array_equal(a.episode.log_probs, b.episode.log_probs) for a, b in zip(first, again, strict=True))
    told["again"] = [each.episode.row.input_ids.tolist() for each in again] == told["answers"] and all(same)

    result = loop.step(steps[0])
    told["step"] = result.metrics

    load, sampler._load = sampler._load, lambda: None
    told["skipped"] = failure(lambda: loop.step(steps[1]))
    sampler._load, sampler._synced = load, None
    told["after_skipped"] = failure(answer)

    # a prompt of several blocks, which vLLM keeps
    prompt = Row(np.arange(200, dtype=np.int32) % 50 + 5, np.zeros(200, np.bool_), [200], [7])
    old = sampler.sample([prompt], 1, 3, lambda: None)
    kept = sampler._llm.reset_prefix_cache
    loop.step(steps[2])
    new = sampler.sample([prompt], 1, 3, lambda: None)
    with torch.no_grad():
        experience = judge._judge(new)
    told["new_weights"] = [old[0].log_probs.tolist(), new[0].log_probs.tolist(), largest(experience)]
    judge._check.conclude()
    sampler._llm.reset_prefix_cache = lambda: True
    loop.step(steps[3])
    with torch.no_grad():
        stale = judge._judge(sampler.sample([prompt], 1, 3, lambda: None))
    told["stale_cache"] = [largest(stale), *failure(judge._check.conclude)]
    sampler._llm.reset_prefix_cache = lambda: False
    sampler._synced = None
    told["no_reset"] = failure(answer)
    sampler._llm.reset_prefix_cache = kept

    told["before_change"] = failure(answer)
    if group.rank == 1:
        told["changed_tensor"] = sampler._llm.apply_model(change)
    told["changed"] = failure(answer)
    return told


def change(model: torch.nn.Module) -> str:
    """Change one of vLLM's own tensors: the last norm's."""
    name, parameter = [(n, p) for n, p in model.named_parameters() if n.endswith("norm.weight")][-1]
    parameter.data.view(-1)[: parameter.numel() // 2].mul_(1.5)
    return name


def main() -> None:
    root, precision, zero, adapter = Path(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:])
    artifacts = {name: Artifact(**each) for name, each in json.loads((root / "artifacts.json").read_text()).items()}
    prepared = PreparedData.open(local_path(artifacts["prepared"].uri), None)
    prepared.info = prepared.info.model_copy(update={"max_length": LENGTH})
    group = Group()
    rollout = Rollout(max_new_tokens=12, engine=RolloutEngine.VLLM, temperature=TEMPERATURE)
    config = stage(
        artifacts["prepared"],
        type="ppo",
        folder=(root / precision).as_uri(),
        model=artifacts["model"],
        reference=artifacts["model"],
        reward=artifacts["reward"],
        precision=precision,
        zero_stage=zero,
        lora=Lora(rank=adapter) if adapter else None,
        ppo=Ppo(rollout=rollout),
        recipe={"global_batch_size": BATCH, "micro_batch_size": 2, "learning_rate": 3e-2, "warmup_ratio": 0.0},
    )
    engine = Engine(load_model(config, prepared, verify=False), config)
    loop = build_loop(config, group, prepared, engine, Fence(root, 1), lambda: False, lambda: None)
    assert isinstance(loop, PpoLoop)
    sampler = loop._judge._sampler
    assert isinstance(sampler, VllmSampler)
    told = ask(loop, sampler, group)
    (root / f"told-{precision}-{group.rank}.json").write_text(json.dumps(told))
    group.barrier()


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # as the worker
