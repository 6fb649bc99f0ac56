"""The training processes: DeepSpeed, the optimiser loop, checkpoints and the result."""
