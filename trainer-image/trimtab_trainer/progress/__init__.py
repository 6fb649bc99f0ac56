"""What a running stage tells the world: its metrics, its heartbeat, `/progress` and `/metrics`. Imports no torch."""
