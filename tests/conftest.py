"""Settings of every test: CPU, full float32 products, and oracles that may not be silently absent."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

jax.config.update("jax_default_matmul_precision", "highest")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """With SDZERO_REQUIRE_ORACLES=1 a skipped oracle test is a failure: CI must not lose one quietly."""
    outcome = yield
    report = outcome.get_result()
    if report.skipped and os.environ.get("SDZERO_REQUIRE_ORACLES") == "1" and item.get_closest_marker("oracle"):
        report.outcome = "failed"
        report.longrepr = f"oracle skipped although SDZERO_REQUIRE_ORACLES=1: {report.longrepr}"
