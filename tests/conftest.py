"""Settings of every test: 8 CPU devices and exact matrix products, whatever the machine has; the parity table."""

import os
import tempfile
from collections.abc import Callable

import jax
import numpy as np
import pytest


def pytest_configure(config: pytest.Config) -> None:
    expression = config.option.markexpr
    if "gpu" not in expression or "not gpu" in expression:
        jax.config.update("jax_platforms", "cpu")
        # Most of the time goes into compiling small programs that run once, and LLVM at level 0 halves it. What XLA makes of a
        # program (sharding, fusion, precision) stays as it is. For LLVM's own level: XLA_FLAGS= pytest
        os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
    # Meshes need more than one device; a program without a mesh runs on the first.
    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_default_matmul_precision", "highest")
    # One folder for the compiled programs of all workers and of the processes that tests start.
    if "PYTEST_XDIST_WORKER" not in os.environ:
        cache = tempfile.TemporaryDirectory(prefix="magref_jax_cache_", ignore_cleanup_errors=True)
        os.environ["XDG_CACHE_HOME"] = cache.name
        config.add_cleanup(cache.cleanup)
    jax.config.update("jax_compilation_cache_dir", os.path.join(os.environ["XDG_CACHE_HOME"], "programs"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


Close = Callable[[str, np.ndarray, np.ndarray, float], None]


@pytest.fixture
def close(record_property: Callable[[str, object], None]) -> Close:
    """Asserts that no value is further from torch's than `atol`, and notes the distance for the table below."""

    def check(label: str, actual: np.ndarray, expected: np.ndarray, atol: float) -> None:
        record_property("parity", (label, float(np.max(np.abs(np.asarray(actual) - expected))), atol))
        np.testing.assert_allclose(actual, expected, rtol=0, atol=atol)

    return check


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Prints the largest distance of each network and solver from torch."""
    reports = [report for outcome in ("passed", "failed") for report in terminalreporter.getreports(outcome)]
    rows = [value for report in reports for name, value in report.user_properties if name == "parity"]
    if rows:
        terminalreporter.section("largest difference from torch, float32")
    for label in dict.fromkeys(label for label, _, _ in rows):
        errors, bounds = zip(*((error, atol) for name, error, atol in rows if name == label), strict=True)
        terminalreporter.line(f"{label:32} {max(errors):.1e}  (allowed {max(bounds):.0e}, {len(errors)} comparisons)")
