"""How the cost of a solver's step of MAGREF 14B grows with devices and frames, as the compiler has it.

    python -m magref_jax.evaluation.cost_growth

compiles the step of one video for 1, 2, 4 and 8 devices and 17, 49 and 81 frames, writes docs/scaling/growth.json and growth.svg,
and prints the table of docs/scaling.md. The devices are a CPU's in place of H100s: for them XLA divides a program as for others,
and leaves its matrix products to be counted.
"""

import dataclasses
import itertools
import json
import math
import pathlib
from collections.abc import Iterable, Sequence

import tyro

from magref_jax import pipeline, planner
from magref_jax.command import check_local, check_output_folder, program
from magref_jax.config import ModelConfig
from magref_jax.files import replacing

# Axes in the order in which a user would open them: guidance has two rows.
MESHES = {1: "", 2: "fsdp=2", 4: "fsdp=2,context=2", 8: "fsdp=2,context=4"}  # by devices
COLOURS = {17: "#2e8b57", 49: "#1f5fbf", 81: "#d9730d"}  # by frames


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one device has in one step."""

    frames: int  # of the video
    devices: int
    flops: float  # of the matrix products in its program
    memory: int  # bytes of weights, inputs and temporaries
    sent: int  # bytes

    @property
    def seconds(self) -> float:
        """At the peak of an H100 and of its links, if nothing is sent while it computes."""
        chip = planner.CHIPS["h100"]
        assert chip.peak_flops is not None
        return self.flops / chip.peak_flops + self.sent / chip.link_bandwidth


def measure(frames: int, devices: int, model: ModelConfig | None = None) -> Cost:
    """Compiles the step of the released model, or of another, for this process's CPU devices.

    Raises:
        RuntimeError: there are fewer; see `planner.use_cpu`.
    """
    model = pipeline.with_sampling(model or ModelConfig(), num_frames=frames)
    plan = planner.plan_sampling(model, f"h100:{devices}", MESHES[devices])
    assert plan.counted_flops is not None
    sent = sum(collective.sent for collective in plan.collectives)
    return Cost(frames, devices, plan.counted_flops, plan.used, sent)


def of_length(costs: Iterable[Cost], frames: int) -> list[Cost]:
    """Those of one length of video, by devices."""
    return sorted((cost for cost in costs if cost.frames == frames), key=lambda cost: cost.devices)


def lost_per_doubling(costs: Sequence[Cost], quantity: str) -> float:
    """By what part all devices together take more at each doubling, from the first to the last; 0 is perfect."""
    first, last = (cost.devices * getattr(cost, quantity) for cost in (costs[0], costs[-1]))
    lost = (last / first) ** (1 / math.log2(costs[-1].devices / costs[0].devices)) - 1
    return round(lost, 4) + 0.0  # no -0.0


QUANTITIES = {
    "flops": ("operations of a device, PFLOP", 1e15),
    "memory": ("memory of a device, GiB", 2**30),
    "sent": ("sent by a device, GB", 1e9),
}


def write_table(costs: Sequence[Cost]) -> str:
    """A row for each length of video, as Markdown; a cell has as many numbers as there are numbers of devices."""
    headings = [title for title, _ in QUANTITIES.values()]
    headings = ["frames", *headings, "operations lost per doubling", "with what is sent"]
    lines = [f"| {' | '.join(headings)} |", "| --: | --- | --- | --- | --: | --: |"]
    for frames in COLOURS:
        found = of_length(costs, frames)
        cells = [
            ", ".join(f"{getattr(cost, name) / unit:.3g}" for cost in found) for name, (_, unit) in QUANTITIES.items()
        ]
        cells += [f"{lost_per_doubling(found, quantity):.1%}" for quantity in ("flops", "seconds")]
        lines.append(f"| {frames} | {' | '.join(cells)} |")
    return "\n".join(lines)


PANEL, HEIGHT, LEFT, TOP, GAP = 170, 150, 50, 56, 66  # pixels: a panel without its labels, and what is around it


def draw_plot(costs: Sequence[Cost]) -> str:
    """An SVG: a panel for each quantity, a line for each length of video.

    Both axes are logarithmic, so that nothing sent has no place: what halves with each doubling is a straight line down.
    """
    width, height = LEFT + len(QUANTITIES) * (PANEL + GAP), TOP + HEIGHT + GAP
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    for number, (frames, colour) in enumerate(COLOURS.items()):
        parts.append(f'<circle cx="{LEFT + 110 * number + 5}" cy="14" r="4" fill="{colour}"/>')
        parts.append(f'<text x="{LEFT + 110 * number + 14}" y="18">{frames} frames</text>')
    for column, name in enumerate(QUANTITIES):
        parts += _panel(costs, name, LEFT + column * (PANEL + GAP))
    return "\n".join([*parts, "</svg>", ""])


def _panel(costs: Sequence[Cost], name: str, left: float) -> list[str]:
    title, unit = QUANTITIES[name]
    values = [getattr(cost, name) / unit for cost in costs if getattr(cost, name)]
    lowest, highest = math.floor(math.log2(min(values))), math.ceil(math.log2(max(values)))
    most = math.log2(max(cost.devices for cost in costs))

    def place(devices: int, value: float) -> tuple[float, float]:
        x, y = math.log2(devices) / most, (math.log2(value) - lowest) / max(1, highest - lowest)
        return round(left + PANEL * x, 1), round(TOP + HEIGHT * (1 - y), 1)

    parts = [f'<text x="{left}" y="{TOP - 10}">{title}</text>']
    for power in range(lowest, highest + 1):
        _, y = place(1, 2.0**power)
        parts.append(f'<path d="M{left} {y}h{PANEL}" stroke="#dddddd"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4}" text-anchor="end">{2.0**power:.3g}</text>')
    for devices in sorted({cost.devices for cost in costs}):
        x, y = place(devices, 2.0**lowest)
        parts.append(f'<text x="{x}" y="{y + 16}" text-anchor="middle">{devices}</text>')
    parts.append(f'<text x="{left + PANEL / 2}" y="{TOP + HEIGHT + 34}" text-anchor="middle">devices</text>')
    for frames, colour in COLOURS.items():
        found = [cost for cost in of_length(costs, frames) if getattr(cost, name)]
        points = [place(cost.devices, getattr(cost, name) / unit) for cost in found]
        line = " ".join(f"{x},{y}" for x, y in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x}" cy="{y}" r="3.5" fill="{colour}"/>' for x, y in points]
    return parts


def run(out: tyro.conf.Positional[pathlib.Path] = pathlib.Path("docs/scaling")) -> None:
    """Compiles, which takes some minutes, and writes growth.json and growth.svg."""
    check_local("OUT", out)
    check_output_folder("OUT", out)
    planner.use_cpu(planner.parse_topology("h100:8"))
    costs = []
    for frames, devices in itertools.product(COLOURS, MESHES):
        costs.append(measure(frames, devices))
        print(costs[-1], flush=True)
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps([dataclasses.asdict(cost) for cost in costs], indent=1) + "\n"
    for name, content in (("growth.json", text), ("growth.svg", draw_plot(costs))):
        with replacing(out / name) as part:
            part.write_text(content, encoding="utf-8")
    print(write_table(costs))


def main() -> None:
    with program("evaluation.cost_growth"):
        tyro.cli(run)


if __name__ == "__main__":
    main()
