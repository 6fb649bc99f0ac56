"""Manifests from files: YAML, the CRDs' schemas and their CEL rules, checked as the API server checks them."""
