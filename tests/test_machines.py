"""What docs/scaling.md promises: that each job fits its machine, by compiling it for the real chips."""

import importlib.util
import pathlib
import re

import jax
import pytest

from magref_jax.machines import JOBS, read_plan, write_table
from magref_jax.planner import parse_topology
from magref_jax.sharding import MESH_AXES
from tests.test_planner import some_plan

PAGE = (pathlib.Path(__file__).parents[1] / "docs" / "scaling.md").read_text(encoding="utf-8")
GOOGLE = {"v5e": 1, "v5p": 2, "v6e": 1}  # what a chip counts in the name of a machine
names = [job.name for job in JOBS]


def test_jobs_have_names_of_their_own():
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("job", JOBS, ids=names)
def test_machine_topology_and_mesh_are_of_the_same_size(job):
    topology = parse_topology(job.topology)
    chip = job.topology.partition(":")[0]
    if chip in GOOGLE:
        assert job.machine == f"{chip}-{GOOGLE[chip] * topology.num_devices}"
    else:
        assert job.machine == f"{topology.num_devices} x {chip.upper()}"
    product = 1
    for part in filter(None, job.mesh.split(",")):
        axis, _, size = part.partition("=")
        assert axis in MESH_AXES
        product *= int(size)
    assert product == topology.num_devices


@pytest.mark.parametrize("job", JOBS, ids=names)
def test_the_page_has_a_row_for_each(job):
    table = PAGE.partition(f"\n`python {job.script}`\n")[2].strip().partition("\n\n")[0]
    start = write_table({job: some_plan()}).splitlines()[-1].split("|")[:4]
    (row,) = [line for line in table.splitlines() if line.split("|")[:4] == start]
    assert int(re.search(r"(\d+)%", row)[1]) <= 90


def test_table_says_what_is_estimated():
    plan = some_plan(topology="h100:8", compiled_for="cpu", capacity=80 * 2**30)
    (job,) = [job for job in JOBS if job.machine == "8 x H100" and not job.preset]
    assert write_table({job: plan}).splitlines()[2] == (
        "| 8 x H100 | `h100:8` | `--mesh fsdp=2,context=4` | 50.0 | about 10.0 | about 75% | about 900 GB | 2 s | 0.0 min |"
    )


def test_plans_are_read_as_they_were_written(tmp_path):
    plan = some_plan(counted_flops=7)
    (tmp_path / "plan.json").write_text(plan.to_json())
    assert read_plan(tmp_path / "plan.json") == plan


# An hour or more in all.
@pytest.mark.slow
@pytest.mark.parametrize("job", JOBS, ids=names)
def test_it_fits(job):
    if parse_topology(job.topology).chip.platform == "tpu" and importlib.util.find_spec("libtpu") is None:
        pytest.skip("needs libtpu, the TPU compiler")
    with jax.default_matmul_precision("default"):  # as outside of tests
        plan = job.plan()
    assert plan.fits
    assert plan.used <= 0.9 * plan.capacity
    assert plan.chips_at_work == parse_topology(job.topology).num_devices
