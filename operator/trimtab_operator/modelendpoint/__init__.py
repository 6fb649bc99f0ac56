"""ModelEndpoint: observe, plan, manifests, status, and one file a policy."""
