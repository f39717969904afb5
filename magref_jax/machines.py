"""Machines to rent for MAGREF 14B, and what each is planned to do: the tables of docs/scaling.md.

    python -m magref_jax.machines PLANS

writes PLANS/NAME.json for every job that has none there yet, and prints the tables. Each is a compilation of the real step for
the real chips (`magref_jax.planner`): an hour or more in all. `pytest -m slow tests/test_machines.py` compiles them too, and
fails where one does not fit.
"""

import dataclasses
import importlib
import itertools
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import tyro

from magref_jax import pipeline, planner
from magref_jax.command import check_local, check_output_folder, program
from magref_jax.config import ModelConfig
from magref_jax.files import replacing
from magref_jax.hlo import Collective
from magref_jax.prompts import SIZES


@dataclasses.dataclass(frozen=True)
class Job:
    """Something to do on a machine: to sample one video, or to train."""

    machine: str  # as it is rented: Google counts the cores of a v5p, two on a chip
    topology: str  # as it is planned, in chips
    mesh: str
    preset: str = ""  # of configs/; "" samples
    size: str = "480p"  # in sampling
    parts: int = 1  # that a batch is computed in

    @property
    def name(self) -> str:
        return "_".join((self.preset or f"sample_{self.size}", self.topology.replace(":", "_")))

    @property
    def script(self) -> str:
        return f"train.py configs/{self.preset}.py" if self.preset else "sample.py --model models/magref"

    @property
    def options(self) -> str:
        """Of the script: with them it does the job on the machine, and with `--plan TOPOLOGY` too it plans it anywhere."""
        given = {
            "--mesh": self.mesh,
            "--size": "" if self.size == "480p" else self.size,
            "--config.accumulation_steps": "" if self.parts == 1 else self.parts,
        }
        return " ".join(f"{name} {value}" for name, value in given.items() if value)

    def plan(self) -> planner.Plan:
        """Compiles it, which takes minutes; from the repository root."""
        if self.preset:
            # The presets are beside the package, in the repository root, and so is what reads them.
            config = importlib.import_module("train").load_config(f"configs/{self.preset}.py")
            config = dataclasses.replace(config, accumulation_steps=self.parts)
            return planner.plan_training(config, self.topology, self.mesh, model=ModelConfig())
        width, height = SIZES[self.size]
        return planner.plan_sampling(
            pipeline.with_sampling(ModelConfig(), width=width, height=height), self.topology, self.mesh
        )


JOBS = (
    Job("v6e-4", "v6e:2x2", "fsdp=2,context=2"),
    Job("v6e-8", "v6e:2x4", "fsdp=2,context=4"),
    Job("v5e-16", "v5e:4x4", "fsdp=2,context=8"),
    Job("v5p-8", "v5p:2x2x1", "fsdp=2,context=2"),
    Job("1 x H100", "h100:1", ""),
    Job("8 x H100", "h100:8", "fsdp=2,context=4"),
    Job("v6e-8", "v6e:2x4", "fsdp=2,context=4", size="720p"),
    Job("1 x H100", "h100:1", "", size="720p"),
    Job("v6e-16", "v6e:4x4", "fsdp=4,context=4", "magref_14b_lora", parts=2),
    Job("8 x H100", "h100:8", "fsdp=8", "magref_14b_lora"),
    Job("v5p-64", "v5p:2x4x4", "fsdp=32", "magref_14b_480p", parts=2),
    Job("v5p-128", "v5p:4x4x4", "fsdp=64", "magref_14b_480p"),
    Job("v6e-64", "v6e:8x8", "fsdp=8,context=8", "magref_14b_480p", parts=8),
    Job("v6e-256", "v6e:16x16", "fsdp=64,context=4", "magref_14b_480p"),
)


def read_plan(path: pathlib.Path) -> planner.Plan:
    """A plan as `Plan.to_json` wrote it."""
    read: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    read["collectives"] = tuple(Collective(**each) for each in read["collectives"])
    return planner.Plan(**{field.name: read[field.name] for field in dataclasses.fields(planner.Plan)})


def write_table(plans: Mapping[Job, planner.Plan]) -> str:
    """A row for each plan, as Markdown; of GPUs, what another compiler says is "about" that."""
    headings = "machine, --plan, options, weights and state, temporaries, of a chip, sent by a chip, a step at least, compiled in"
    lines = [f"| {headings.replace(', ', ' | ')} |", "| --- | --- | --- | --: | --: | --: | --: | --: | --: |"]
    for job, plan in plans.items():
        about = "" if plan.compiled_for == plan.chip.platform else "about "
        sent = sum(collective.sent for collective in plan.collectives)
        temporaries = plan.temporaries or 0
        cells = [
            job.machine,
            f"`{job.topology}`",
            f"`{job.options}`" if job.options else "",
            f"{(plan.used - temporaries) / planner.GIB:.1f}",
            f"{about}{temporaries / planner.GIB:.1f}",
            f"{about}{plan.used / plan.capacity:.0%}{'' if plan.fits else ': does not fit'}",
            f"{about}{planner._count(sent)}B" if sent else "",
            f"{plan.bound:.3g} s",
            f"{plan.compile_seconds / 60:.1f} min",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def run(plans: tyro.conf.Positional[pathlib.Path]) -> None:
    """Compiles what has no plan in the folder yet, and prints the tables."""
    check_local("PLANS", plans)
    check_output_folder("PLANS", plans)
    planner.use_cpu(planner.parse_topology("h100:8"))
    plans.mkdir(parents=True, exist_ok=True)
    for job in JOBS:
        path = plans / f"{job.name}.json"
        if not path.exists():
            print(f"{path}: {job.script} {job.options}", flush=True)
            with replacing(path) as part:
                part.write_text(job.plan().to_json(), encoding="utf-8")
    for script, jobs in itertools.groupby(JOBS, lambda job: job.script):
        found = {job: read_plan(plans / f"{job.name}.json") for job in jobs}
        print(f"\n`python {script}`\n\n{write_table(found)}")


def main() -> None:
    with program("machines"):
        tyro.cli(run)


if __name__ == "__main__":
    main()
