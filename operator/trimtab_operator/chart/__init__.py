"""The Helm chart's values as pydantic models: the source of its `values.yaml`, schema and reference.

Nothing of the running operator imports this.
"""
