"""What runs as the container's first process: starts `torchrun`, watches it, answers for it. Imports no torch."""
