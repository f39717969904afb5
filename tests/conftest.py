"""Settings of every test: 8 CPU devices and exact matrix products, whatever the machine has."""

import jax
import pytest


def pytest_configure(config: pytest.Config) -> None:
    expression = config.option.markexpr
    if "gpu" not in expression or "not gpu" in expression:
        jax.config.update("jax_platforms", "cpu")
    # Meshes need more than one device; a program without a mesh runs on the first.
    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_default_matmul_precision", "highest")
