"""Losses and schedules as free functions."""
