"""The custom resources as pydantic models: the source of the CRDs, the chart's copies and the reference page.

Data only: no I/O, no Kubernetes client. A rule that a user can break is CEL, beside the class, with a message that says
what to do.
"""
