"""Prepare: everything about data that can fail, before an accelerator is claimed."""
