"""What one device does in an optimised HLO module, read off its text: what it sends to others, and its matrix products.

XLA's own `cost_analysis` takes the body of a loop once. Here a body counts as often as its loop runs, once where the text does
not say how often.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

_COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
_ITEM_BITS = {"pred": 8, "token": 0, "opaque": 0}
_SHAPE = re.compile(r"\b([a-z][a-z0-9]*)\[([0-9,]*)\]")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?)\s([a-z][\w\-]*)\((.*)$")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|branch_computations|called_computations)=(?:\{([^}]*)\}|%?([\w.\-]+))"
)


@dataclasses.dataclass(frozen=True)
class Collective:
    """One kind of exchange between chips, over a whole step."""

    kind: str
    count: int
    sent: int  # bytes that leave each chip


def parse_collectives(hlo: str) -> tuple[tuple[Collective, ...], int]:
    """The exchanges of a module, by kind, and the number of loops whose length the text does not say.

    What a chip sends is that of the algorithm which sends least, of n chips in a group: of the bytes of the operand, n − 1 times
    as many in an all-gather, 2(n − 1)/n in an all-reduce, (n − 1)/n in a reduce-scatter or all-to-all, all in a permutation.
    """

    def measure(found: _Instruction, shapes: Mapping[str, str]) -> Mapping[str, int]:
        kind = found.opcode.removesuffix("-start")
        if kind not in _COLLECTIVES:
            return {}
        operand = sum(_num_bytes(shapes.get(name, "")) for name in found.operands)
        return {f"{kind} sent": round(operand * _share(kind, _group_size(found.line))), kind: 1}

    total, unknown = _total(hlo, measure)
    kinds = [kind for kind in sorted(_COLLECTIVES) if total[kind]]
    return tuple(Collective(kind, total[kind], total[f"{kind} sent"]) for kind in kinds), unknown


def count_flops(hlo: str) -> tuple[int, int]:
    """Floating point operations of a module's matrix products, and the number of loops whose length the text does not say.

    For programs of a CPU: the TPU's compiler leaves no product as one, and no text shows what a kernel computes.
    """

    def measure(found: _Instruction, shapes: Mapping[str, str]) -> Mapping[str, int]:
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", found.line) if found.opcode == "dot" else None
        if contracted is None:
            return {}
        ((_, sizes),) = _arrays(shapes[found.operands[0]])
        ((_, made),) = _arrays(found.shape)
        return {"flops": 2 * math.prod(made) * math.prod(sizes[int(axis)] for axis in contracted[1].split(",") if axis)}

    total, unknown = _total(hlo, measure)
    return total["flops"], unknown


class _Instruction(NamedTuple):
    name: str
    shape: str
    opcode: str
    operands: Sequence[str]  # names
    line: str


def _total(
    hlo: str, measure: Callable[[_Instruction, Mapping[str, str]], Mapping[str, int]]
) -> tuple[collections.Counter[str], int]:
    """What is measured of all instructions, as often as each runs, and the number of loops of unknown length.

    `measure` is given an instruction, and the shapes of all by name.
    """
    shapes: dict[str, str] = {}
    bodies: dict[str, list[_Instruction]] = {}
    entry = current = ""
    for line in hlo.splitlines():
        if header := _COMPUTATION.match(line):
            current = header[2]
            bodies[current] = []
            entry = current if header[1] else entry
        elif found := _INSTRUCTION.match(line):
            name, shape, opcode, rest = found.groups()
            shapes[name] = shape
            operands = re.findall(r"%([\w.\-]+)", rest.partition(")")[0])
            bodies.setdefault(current, []).append(_Instruction(name, shape, opcode, operands, line))
    unknown: set[str] = set()

    @functools.cache
    def count(computation: str) -> collections.Counter[str]:
        total: collections.Counter[str] = collections.Counter()
        for instruction in bodies.get(computation, ()):
            opcode, line = instruction.opcode, instruction.line
            total.update(measure(instruction, shapes))
            if opcode.endswith(("-done", "-update")):  # the same computation that the -start names
                continue
            if opcode.removesuffix("-start") in _COLLECTIVES:  # what it calls is the sum that a reduction applies
                continue
            times = _trip_count(line, bodies) if opcode == "while" else 1
            if not times:
                unknown.add(line)
            for called in _called(line):
                total.update({name: (times or 1) * number for name, number in count(called).items()})
        return total

    return count(entry), len(unknown)


def _arrays(shape: str) -> list[tuple[str, tuple[int, ...]]]:
    """Item types and sizes of an array, or of each in a tuple."""
    return [(dtype, tuple(int(size) for size in sizes.split(",") if size)) for dtype, sizes in _SHAPE.findall(shape)]


def _num_bytes(shape: str) -> int:
    total = 0
    for dtype, sizes in _arrays(shape):
        bits = _ITEM_BITS.get(dtype)
        if bits is None:
            digits = re.search(r"\d+", dtype)
            bits = int(digits[0]) if digits else 0
        total += bits * math.prod(sizes) // 8
    return total


def _group_size(line: str) -> int:
    """Chips of one group: 2 of {{0,1},{2,3}}, of [2,2]<=[4] and of mesh['a'=2,'b'=4] {'a'}; 2 if none are named."""
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return found[1].count(",") + 1
    if found := re.search(r"replica_groups=\[[\d,]*?(\d+)\]<=", line):
        return int(found[1])
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", line):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", found[1])}
        # Of an axis, or of a part of it: 'a':(before)size.
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", found[2])
        return math.prod(int(part) if part else sizes[name] for name, part in axes)
    return 2


def _share(kind: str, group: int) -> float:
    shares = {"all-gather": group - 1, "all-reduce": 2 * (group - 1) / group, "collective-permute": 1}
    return shares.get(kind, (group - 1) / group)


def _called(line: str) -> Iterator[str]:
    for several, one in _CALLED.findall(line):
        for name in (one or several).split(","):
            yield name.strip().removeprefix("%")


def _trip_count(line: str, bodies: Mapping[str, Sequence[_Instruction]]) -> int | None:
    """How often a loop runs, as the compiler notes it, or counting up to the one number that its condition compares with."""
    if found := re.search(r"known_trip_count\D+(\d+)", line):
        return int(found[1])
    condition, body = (
        {each.name: each for each in bodies.get(found[1] if found else "", ())}
        for found in (re.search(rf"{part}=%?([\w.\-]+)", line) for part in ("condition", "body"))
    )
    numbers = [each for each in map(_number, condition.values()) if each is not None]
    compared = [each for each in condition.values() if each.opcode == "compare" and "direction=LT" in each.line]
    if len(numbers) != 1 or len(compared) != 1:
        return None
    return math.ceil(numbers[0] / _step(compared[0], condition, body))


def _step(compared: _Instruction, condition: Mapping[str, _Instruction], body: Mapping[str, _Instruction]) -> int:
    """What the body of a loop adds to the number that its condition compares: more than 1 where the compiler unrolled it."""
    counter = condition.get(compared.operands[0])
    index = re.search(r"index=(\d+)", counter.line) if counter else None
    root = next((each for each in body.values() if each.line.lstrip().startswith("ROOT")), None)
    if index is None or root is None or root.opcode != "tuple":
        return 1
    added = body.get(root.operands[int(index[1])])
    steps = [_number(body[name]) for name in added.operands if name in body] if added and added.opcode == "add" else []
    return next((step for step in steps if step), 1)


def _number(instruction: _Instruction) -> int | None:
    found = re.search(r"\bconstant\((\d+)\)", instruction.line) if instruction.opcode == "constant" else None
    return int(found[1]) if found else None
