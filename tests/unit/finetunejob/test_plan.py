"""The walk from acceptance to the end, in a simulated cluster."""

from tests.unit.finetunejob.world import DIGEST, World, spec


def test_one_stage_runs_to_complete() -> None:
    world = World(spec())
    world.settle()
    assert world.status["phase"] == "Preparing"
    world.succeed("prepare")
    world.settle()
    assert world.status["phase"] == "Running"
    assert world.stage("one")["prepared"]["tokens"] == 100
    world.succeed("one")
    world.settle()
    assert world.status["phase"] == "Succeeded"
    assert world.condition("Complete")["status"] == "True"
    folder = f"pvc://models/m/job-{world.owner['metadata']['uid'][:8]}/one/model"
    assert world.stage("one")["artifact"] == {"uri": folder, "digest": DIGEST}
    assert len(world.status_writes) <= 6
