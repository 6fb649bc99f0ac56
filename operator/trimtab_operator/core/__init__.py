"""What knows no kind: the API server's client, the store, the queue, the loop."""
