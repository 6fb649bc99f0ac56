"""Local mode: the operator's core against an in-memory API, pods as processes of this machine."""
