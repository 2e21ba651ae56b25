"""Settings of every test: CPU, full float32 products, and oracles that may not be silently absent."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

jax.config.update("jax_default_matmul_precision", "highest")


@pytest.fixture(scope="module")
def quick_compiles():
    """For files that compile many small programs and run each once."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


# What takes longest comes first, else a worker that begins it late is alone with it at the end.
LONGEST = ("compare", "resume", "memory", "hosts", "stores", "attention_kernels", "problems", "code_judge", "cli")


def pytest_collection_modifyitems(items):
    place = {f"test_{name}.py": number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


def _oracles_required() -> bool:
    """With SDZERO_REQUIRE_ORACLES=1 a skipped oracle is a failure: CI must not lose one quietly."""
    return os.environ.get("SDZERO_REQUIRE_ORACLES") == "1"


def _fail(report) -> None:
    report.outcome = "failed"
    report.longrepr = f"oracle skipped although SDZERO_REQUIRE_ORACLES=1: {report.longrepr}"


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """A single oracle test that skipped itself."""
    report = (yield).get_result()
    if report.skipped and _oracles_required() and item.get_closest_marker("oracle"):
        _fail(report)


@pytest.hookimpl(hookwrapper=True)
def pytest_make_collect_report(collector):
    """A whole file that skipped itself because its oracle cannot be imported."""
    report = (yield).get_result()
    if report.skipped and _oracles_required():
        _fail(report)
