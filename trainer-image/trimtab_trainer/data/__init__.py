"""Training data: from files that people have to memory-mapped rows of tokens."""
