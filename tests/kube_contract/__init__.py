"""The contract of `Kube`, as tests that each implementation imports."""

import pytest

pytest.register_assert_rewrite("tests.kube_contract.suite", "tests.kube_contract.workloads")
