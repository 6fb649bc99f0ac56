"""Trimtab's trainer: prepares data, trains a stage with DeepSpeed, and writes a verified result.

The operator imports `trimtab_trainer.config` only; nothing here imports torch on its own.
"""
