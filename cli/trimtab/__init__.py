"""The `trimtab` command, also reached as `kubectl trimtab`."""
