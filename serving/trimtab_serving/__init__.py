"""Serving: a launcher that verifies an artifact and then becomes vLLM."""
