"""How the cost of a step grows: what is counted against closed forms, and the arithmetic on it."""

import itertools
import xml.etree.ElementTree as ET

import pytest

from magref_jax.evaluation import cost_growth
from magref_jax.evaluation.cost_growth import COLOURS, MESHES, QUANTITIES, Cost
from magref_jax.models.dit import dit_flops
from tests.test_planner import MODEL


def cost(frames=81, devices=1, flops=8e15, memory=2**33, sent=0):
    return Cost(frames, devices, flops, memory, sent)


# Of operations and memory half at each doubling.
COSTS = [
    cost(frames, n, flops=frames * 1e15 / n, memory=2**33 // n, sent=n // 2 * 10**9)
    for frames, n in itertools.product(COLOURS, MESHES)
]


def test_what_a_doubling_loses():
    lost = cost_growth.lost_per_doubling
    assert lost(COSTS[:4], "flops") == 0
    # Eight devices that do 1.1³ times the work of one.
    assert lost([cost(flops=8), cost(devices=8, flops=1.331)], "flops") == pytest.approx(0.1)
    # 989 TFLOP and 450 GB take an H100 a second each: 1 s on one device, 0.5 + 0.1 on two.
    found = [cost(flops=989e12), cost(devices=2, flops=494.5e12, sent=45 * 10**9)]
    assert lost(found, "seconds") == pytest.approx(0.2)


def test_table():
    first, *_, last = cost_growth.write_table(COSTS).splitlines()[2:]
    assert first.startswith("| 17 | 17, 8.5, 4.25, 2.12 | 8, 4, 2, 1 | 0, 1, 2, 4 | 0.0% |")
    assert last.startswith("| 81 | 81, 40.5, 20.2, 10.1 | 8, 4, 2, 1 | 0, 1, 2, 4 | 0.0% |")


def test_plot_has_a_line_for_each_length_in_each_panel():
    svg = ET.fromstring(cost_growth.draw_plot(COSTS))
    lines = [line.attrib["points"].split() for line in svg.iter("{http://www.w3.org/2000/svg}polyline")]
    assert len(lines) == len(QUANTITIES) * len(COLOURS)
    # What halves is straight: equal steps to the right and down.
    for points in lines[:6]:
        xs, ys = zip(*(map(float, point.split(",")) for point in points), strict=True)
        assert xs[3] - xs[2] == pytest.approx(xs[1] - xs[0], abs=0.11)
        assert ys[3] - ys[2] == pytest.approx(ys[1] - ys[0], abs=0.11)
        assert ys[1] > ys[0]
    assert len(lines[6]) == 3  # of one device, nothing is sent


@pytest.mark.parametrize("devices", [1, 2])
def test_counted_operations_are_those_of_the_formula(devices):
    """But for the few that the formula leaves out: no product is repeated, on a device or on two, and none is missed."""
    found = cost_growth.measure(9, devices, MODEL)
    # 9 frames of 8 x 12 pixels are 5 x 4 x 6 latents; the text, and 4 patches and a class token of an image.
    tokens, context_tokens = 5 * 2 * 3, 40 + 5
    assert found.flops * devices == pytest.approx(2 * dit_flops(MODEL.dit, tokens, context_tokens), rel=0.05)
    assert (found.sent > 0) == (devices > 1)
