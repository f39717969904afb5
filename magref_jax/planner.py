"""Whether a configuration fits a machine, and what a step costs there, before anyone rents it.

    plan = plan_training(config, "v5p:4x4x8", "fsdp=32,context=4")
    print(plan.table())

The real step is compiled for the real chips, by XLA's TPU compiler (`pip install libtpu`), which needs none of them; shapes
stand for the weights. There is no compiler for GPUs without a GPU: that step is compiled for as many CPU devices, whose plan
of temporaries is an estimate. Every figure of a plan is one of three kinds:

    exact     bytes of parameters, optimiser, average and inputs: shapes, dtypes and shardings say them
    compiler  temporaries, and which collectives there are in the optimised program
    estimate  seconds: operations and bytes by formula, over what the vendor says the chip can do at most

Operations are counted by formula because the compiler's own count takes the body of a loop once, which is one layer of
forty, and takes a Pallas kernel, which is the attention, for nothing.
"""

import dataclasses
import functools
import importlib.util
import itertools
import json
import math
import os
import pathlib
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from magref_jax import pipeline
from magref_jax.checkpoint import Params
from magref_jax.config import RELEASED, DType, ModelConfig, Remat, load_model_config, with_dtype
from magref_jax.data.precompute import encode_batch
from magref_jax.files import replacing
from magref_jax.hlo import Collective, count_flops, parse_collectives
from magref_jax.models.adapters import LoraConfig, init_lora, scale_lora
from magref_jax.models.dit import dit_flops
from magref_jax.sharding import MESH_AXES, PARAM_SPECS, activation_spec, batch_multiple, make_mesh, param_shardings
from magref_jax.training.config import DiTTask, TrainConfig
from magref_jax.training.dit_task import as_batch, model_config
from magref_jax.training.monitor import peak_flops, train_flops
from magref_jax.training.objective import Batch, Null, flow_matching
from magref_jax.training.optimizer import join_params, make_optimizer, split_params
from magref_jax.training.step import init_state, state_shardings, train_step

GIB = 2**30
# For a CPU that stands for a GPU. It multiplies in float32, and would convert the weights of all layers before the loop over
# them, which takes twice the memory of the model; no GPU does.
STAND_IN: dict[str, bool | str] = {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"}
USABLE = 0.9  # of a chip's memory; the rest is for fragmentation and what else the runtime holds


@dataclasses.dataclass(frozen=True)
class Chip:
    """What one chip can do at most, as its vendor says."""

    device_kind: str  # under which `training.monitor.PEAK_FLOPS` knows it
    memory: int  # bytes that a program can have
    memory_bandwidth: float  # bytes/s
    link_bandwidth: float  # bytes/s that leave the chip over all its fast links together, one way
    platform: str = "tpu"

    @property
    def peak_flops(self) -> float | None:
        return peak_flops(self.device_kind)


# cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}, read in November 2026, where ICI is given both ways together; Nvidia's data sheets
# of A100, H100 and H200 (SXM), NVLink likewise. Of the 16 GiB of a v5e and the 32 of a v6e, the compiler has 15.75 and 31.25. A
# CPU stands for whatever it is: no roofline.
CHIPS: Mapping[str, Chip] = {
    "v4": Chip("TPU v4", 32 * GIB, 1200e9, 300e9),
    "v5e": Chip("TPU v5 lite", 63 * GIB // 4, 819e9, 200e9),
    "v5p": Chip("TPU v5p", 95 * GIB, 2765e9, 600e9),
    "v6e": Chip("TPU v6 lite", 125 * GIB // 4, 1600e9, 400e9),
    "a100": Chip("NVIDIA A100-SXM4-80GB", 80 * GIB, 2039e9, 300e9, "gpu"),
    "h100": Chip("NVIDIA H100 80GB HBM3", 80 * GIB, 3350e9, 450e9, "gpu"),
    "h200": Chip("NVIDIA H200", 141 * 10**9, 4800e9, 450e9, "gpu"),
    "cpu": Chip("cpu", 0, 0, 0, "cpu"),
}


DIMENSIONS = {"v4": 3, "v5p": 3, "v5e": 2, "v6e": 2}  # in which chips are connected; 1 for others
CORES = ("v4", "v5p")  # rented by their number of cores, two on a chip


@dataclasses.dataclass(frozen=True)
class Topology:
    """So many chips of one kind, and how they are connected."""

    name: str  # such as "v5p:4x4x8": chips, not cores
    chip: Chip
    num_devices: int


def parse_topology(text: str) -> Topology:
    """The topology of "v5p:4x4x8", "v6e:2x4", "h100:8" or "cpu:8".

    Raises:
        ValueError: an unknown chip, or no sizes; of the name of a machine such as "v6e-8", says what its topology is.
    """
    name, colon, sizes = text.strip().lower().partition(":")
    if (meant := _topology_of_machine(text)) is not None:
        raise ValueError(f"topology={text!r} is the name of a machine; as CHIP:SIZES, in chips, it is {meant}.")
    if name not in CHIPS:
        raise ValueError(f"topology={text!r} names the chip {name!r}; there are {', '.join(CHIPS)}.")
    if not colon or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", sizes):
        raise ValueError(f"topology={text!r} must be CHIP:SIZES, such as v5p:4x4x8 or h100:8.")
    chip, shape = CHIPS[name], [int(size) for size in sizes.split("x")]
    dimensions = DIMENSIONS.get(name, 1)
    if len(shape) != dimensions:
        raise ValueError(f"topology={text!r} has {len(shape)} sizes; {name} is connected in {dimensions} dimensions.")
    return Topology(f"{name}:{sizes}", chip, math.prod(shape))


def _topology_of_machine(text: str) -> str | None:
    """Of a name that Google rents TPUs by, such as "v5p-128" or "v5litepod-16", or of "8xh100", what we call it."""
    name = re.fullmatch(r"(?P<chip>\w+)-(?P<count>\d+)|(?P<number>\d+) ?x ?(?P<gpu>\w+)", text.strip().lower())
    if name is None:
        return None
    chip, count = name["chip"] or name["gpu"], int(name["count"] or name["number"])
    chip = "v5e" if chip == "v5litepod" else chip
    if chip not in CHIPS or count < 1:
        return None
    if chip not in DIMENSIONS:
        return f"{chip}:{count}"
    chips, dimensions = count // 2 if chip in CORES else count, DIMENSIONS[chip]
    doublings = chips.bit_length() - 1
    if chips != 2**doublings:  # shapes of their own
        return None
    # As equal as they can be, the smallest first; four chips of three dimensions are one face of a cube.
    sizes = [2 ** ((doublings + index) // dimensions) for index in range(dimensions)]
    sizes = [2, 2, 1] if (chips, dimensions) == (4, 3) else sizes
    return f"{chip}:{'x'.join(map(str, sizes))}"


def devices(topology: Topology) -> Sequence[jax.Device]:
    """What to compile for: descriptions of TPUs, or CPU devices in place of anything else. Starts no TPU backend.

    Raises:
        ModuleNotFoundError: libtpu, whose compiler it is, is not installed.
        RuntimeError: this process has too few CPU devices, and it is too late to ask for more.
    """
    if topology.chip.platform == "tpu":
        if importlib.util.find_spec("libtpu") is None:
            raise ModuleNotFoundError(f"Planning for {topology.name} needs the TPU compiler: pip install libtpu")
        # libtpu would ask the network where it is, and keep a second process off the chips; here are none.
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        try:
            return topologies.get_topology_desc(platform="tpu", topology_name=topology.name).devices
        except jax.errors.JaxRuntimeError as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(f"topology={topology.name!r} is none that the TPU compiler knows: {reason}") from None
    there = jax.devices("cpu")
    if len(there) < topology.num_devices:
        raise RuntimeError(
            f"{topology.name} is compiled for {topology.num_devices} CPU devices and this process has {len(there)}: call "
            "use_cpu(topology) before anything of JAX runs, or set JAX_NUM_CPU_DEVICES."
        )
    return there[: topology.num_devices]


def use_cpu(topology: Topology) -> None:
    """Makes this process one that plans: JAX's backend is the CPU, with devices enough. Call it before JAX is used."""
    jax.config.update("jax_platforms", "cpu")
    if topology.chip.platform != "tpu":
        jax.config.update("jax_num_cpu_devices", topology.num_devices)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a step needs and takes. Bytes are of one chip, operations of all of them together."""

    step: str  # which
    topology: str
    mesh: Mapping[str, int]
    settings: Mapping[str, Any]  # what else the figures depend on
    compiled_for: str  # the platform whose compiler was asked
    memory: Mapping[str, int]  # exact, but for "temporaries"
    temporaries: int | None  # None: the compiler gave up without saying how much it would have needed
    memory_traffic: int  # inputs read, outputs written, temporaries written and read, each once: no step does with less
    capacity: int  # of a chip; 0: unknown
    flops: float  # of the model
    recomputed_flops: float  # besides, because of remat
    counted_flops: int | None  # of the matrix products in the program of one chip; None: its compiler hides them
    collectives: tuple[Collective, ...]
    loops_of_unknown_length: int
    compile_seconds: float
    chips_at_work: int  # that do not compute the same as another
    failure: str | None = None

    @property
    def used(self) -> int:
        return sum(self.memory.values()) + (self.temporaries or 0)

    @property
    def fits(self) -> bool | None:
        """Whether `USABLE` of the memory is enough; None where it is not known how much there is."""
        if self.failure is not None or self.temporaries is None:
            return False
        return self.used <= USABLE * self.capacity if self.capacity else None

    @property
    def chip(self) -> Chip:
        return parse_topology(self.topology).chip

    @property
    def seconds(self) -> Mapping[str, float]:
        """The least that each resource is busy in a step, if it is used as the vendor says: estimates."""
        if not self.chip.peak_flops:
            return {}
        return {
            "operations": (self.flops + self.recomputed_flops) / self.chips_at_work / self.chip.peak_flops,
            "memory": self.memory_traffic / self.chip.memory_bandwidth,
            "links": sum(collective.sent for collective in self.collectives) / self.chip.link_bandwidth,
        }

    @property
    def bound(self) -> float | None:
        """No step is faster than this many seconds: the busiest resource, all others hidden behind it."""
        return max(self.seconds.values(), default=None)

    def to_json(self) -> str:
        names = ("used", "fits", "seconds", "bound")
        derived = {name: getattr(self, name) for name in names}
        return json.dumps(dataclasses.asdict(self) | derived, indent=2) + "\n"

    def table(self) -> str:
        """The plan as text, each figure with where it comes from."""
        cut = " x ".join(f"{axis}={size}" for axis, size in self.mesh.items() if size > 1) or "one device"
        settings = ", ".join(f"{name} {value}" for name, value in self.settings.items())
        lines = [("step", f"{self.step} on {self.topology}, mesh {cut}"), ("settings", settings)]
        estimated = "" if self.compiled_for == self.chip.platform else f", estimated from a {self.compiled_for} program"
        lines += [(name, f"{_gib(value)}  exact") for name, value in self.memory.items()]
        if self.temporaries is not None:
            lines.append(("temporaries", f"{_gib(self.temporaries)}  compiler{estimated}"))
        if self.capacity:
            part = self.used / self.capacity
            answer = "fits" if self.fits else "does not fit"
            lines.append(
                ("memory", f"{_gib(self.used)}  of {_gib(self.capacity).strip()} per chip, {part:.0%}: {answer}")
            )
        else:
            lines.append(("memory", f"{_gib(self.used)}  per device"))
        again = f", and {_count(self.recomputed_flops)}FLOP again for remat" if self.recomputed_flops else ""
        lines.append(("operations", f"{_count(self.flops)}FLOP a step{again}  formula"))
        if self.chips_at_work < math.prod(self.mesh.values()):
            lines.append(
                ("", f"only {self.chips_at_work} of {math.prod(self.mesh.values())} chips compute different rows")
            )
        if self.counted_flops is not None:
            lines.append(("", f"{_count(self.counted_flops)}FLOP in the program of one chip  compiler{estimated}"))
        for collective in self.collectives:
            sent = f"{collective.count} x, {_count(collective.sent)}B sent by each chip"
            lines.append((collective.kind, f"{sent}  compiler{estimated}"))
        if self.loops_of_unknown_length:
            lines.append(("", f"{self.loops_of_unknown_length} loops of unknown length are counted once"))
        if self.seconds:
            parts = ", ".join(f"{name} {value:.3g} s" for name, value in self.seconds.items())
            lines.append(("at least", f"{self.bound:.3g} s a step  estimate: {parts}"))
        lines.append(("compiled", f"in {self.compile_seconds:.0f} s for {self.compiled_for}"))
        if self.failure:
            lines.append(("failure", self.failure))
        width = max(len(name) for name, _ in lines)
        return "\n".join(f"{name:{width}}  {value}" for name, value in lines)


def _gib(value: int) -> str:
    return f"{value / GIB:8.2f} GiB" if value >= GIB / 100 else f"{value / 2**20:8.3f} MiB"


def _count(value: float) -> str:
    for prefix in ("", "k", "M", "G", "T", "P"):
        if value < 1000:
            return f"{value:.3g} {prefix}"
        value /= 1000
    return f"{value:.3g} E"


def shard_bytes(tree: Any) -> int:
    """Bytes that one device holds of shapes with shardings."""
    return sum(
        math.prod(leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


@dataclasses.dataclass(frozen=True)
class Program:
    """A step before it is compiled, and what is known of it without."""

    step: str
    target: Topology
    mesh: Mesh
    trace: Callable[..., jax.stages.Traced]  # of the arguments
    arguments: tuple[Any, ...]  # shapes, dtypes and shardings
    memory: Mapping[str, int]
    settings: Mapping[str, Any]
    flops: float
    recomputed_flops: float
    rows: int  # that are computed at once


def plan_training(config: TrainConfig, topology: str, mesh: str = "fsdp=-1", **options: Any) -> Plan:
    """What the step of `train.py` needs and takes; see `training_program` for arguments and errors."""
    return compile_program(training_program(config, topology, mesh, **options))


def plan_sampling(config: ModelConfig, topology: str, mesh: str = "fsdp=-1", **options: Any) -> Plan:
    """What a solver's step of `sample.py` needs and takes; see `sampling_program` for arguments and errors."""
    return compile_program(sampling_program(config, topology, mesh, **options))


def training_program(
    config: TrainConfig,
    topology: str,
    mesh: str = "fsdp=-1",
    *,
    model: ModelConfig | None = None,
    batch_size: int | None = None,
    remat: Remat | None = None,
    attention: str | None = None,
) -> Program:
    """The step of `train.py` for a preset, at the size that the model is sampled at.

    Args:
        config: the preset; of its phases, that with the most latents in a batch is taken.
        topology: see `parse_topology`.
        mesh: see `sharding.make_mesh`.
        model: in place of that of the preset's model folder.
        batch_size: of all chips together, in place of the phase's.
        remat: in place of the preset's.
        attention: the implementation; that of "auto" on the chip if not given.

    Raises:
        FileNotFoundError: there is no such model folder, and neither `model` nor the preset says what is in it.
        ValueError: the preset does not train a DiT, or an argument is not of this form.
    """
    task = config.task
    if not isinstance(task, DiTTask):
        raise ValueError("config trains the VAE; only the training of a DiT can be planned.")
    target = parse_topology(topology)
    model = model or _trained_model(task)
    in_training = {
        "dtype": task.dtype or model.dit.dtype,
        "remat": remat or task.remat or model.dit.remat,
        "attention": _attention(model, target, attention),
    }
    compute = dataclasses.replace(model, dit=dataclasses.replace(model.dit, **in_training))
    made = make_mesh(mesh, devices(target))

    whole = NamedSharding(made, P())
    stored = _stored(made, pipeline.abstract_params(model))
    trained, rest, specs, join = _trainable(task, compute, stored["dit"])
    optimizer = make_optimizer(config.optimizer)
    with_ema = config.optimizer.ema_decay is not None
    init = functools.partial(init_state, optimizer=optimizer, with_ema=with_ema)
    state = jax.eval_shape(lambda params: init(params, key=jax.random.key(config.seed)), trained)
    shardings = state_shardings(made, state, optimizer, specs)
    state = _place(state, shardings)

    batch, null = _batch(config, model, batch_size)
    rows = batch.clean_latents.shape[0]
    batch = _place(batch, jax.tree.map(functools.partial(_by_row, made), batch))
    frozen = {"dit": rest, "null": _place(null, jax.tree.map(lambda _: whole, null))}

    def loss(trained: Params, frozen: Any, batch: Batch, keys: jax.Array) -> Any:
        dit, lora = join(trained, frozen["dit"])
        return flow_matching(compute, task.objective, dit, lora, frozen["null"], batch, keys)

    step = functools.partial(train_step, loss, optimizer, config.optimizer.ema_decay, config.accumulation_steps)
    noise = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
    lora = isinstance(task.trainable, LoraConfig)
    latents = batch.clean_latents.shape
    image_tokens = model.image_encoder.num_tokens if model.dit.image_dim and model.image_encoder else 0
    flops = train_flops(model, latents, model.dit.text_len, image_tokens, frozen_kernels=lora)
    forward = rows * dit_flops(model.dit, _num_tokens(model, latents), model.dit.text_len + image_tokens)
    return Program(
        "training step",
        target,
        made,
        trace=jax.jit(step, donate_argnums=0, out_shardings=(shardings, None)).trace,
        arguments=(state, frozen, batch, noise),
        memory={
            "parameters": shard_bytes(state.params),
            "optimiser": shard_bytes(state.optimizer_state),
            "average": shard_bytes(state.ema),
            "frozen": shard_bytes(frozen),
            "batch": shard_bytes(batch),
            "encoders": shard_bytes({name: tree for name, tree in stored.items() if name != "dit"}),
        },
        settings={
            "batch": rows,
            "latents": "x".join(map(str, latents[1:4])),
            "remat": compute.dit.remat,
            "attention": compute.dit.attention,
            "parts": config.accumulation_steps,
        },
        flops=flops,
        recomputed_flops=float(forward) if compute.dit.remat == "block" else 0.0,
        rows=rows // config.accumulation_steps,
    )


def sampling_program(
    config: ModelConfig,
    topology: str,
    mesh: str = "fsdp=-1",
    *,
    batch_size: int = 1,
    text_tokens: int = 256,
    attention: str | None = None,
) -> Program:
    """A solver's step of `sample.py` at the size in `config.sampling`, all branches of guidance in one batch.

    `batch_size` is filled up to what the mesh divides, as in sampling; `text_tokens` are those the DiT sees of prompt and
    negative prompt. Weights are bfloat16. The other arguments are those of `training_program`.
    """
    target = parse_topology(topology)
    in_sampling = {"attention": _attention(config, target, attention)}
    config = dataclasses.replace(config, dit=dataclasses.replace(config.dit, **in_sampling))
    made = make_mesh(mesh, devices(target))
    branches = len(pipeline.guidance(config))
    batch_size += -batch_size % batch_multiple(made, branches)
    text_tokens = min(text_tokens, config.dit.text_len)
    whole = NamedSharding(made, P())
    params = _stored(made, pipeline.abstract_params(config))

    static = pipeline._static(config, made)
    arrays, noise = _case_arrays(config, batch_size, text_tokens)
    arrays |= {f"negative_{name}": arrays[name] for name in ("token_ids", "attention_mask")}
    encode = functools.partial(pipeline._encode, **static["encode"])
    inputs, state, _ = jax.eval_shape(encode, params, arrays, noise)
    conditioning = jax.tree.map(functools.partial(_by_row, made), inputs.conditioning)
    context = jax.tree.map(functools.partial(_by_name, made, CONTEXT), inputs.context)
    inputs = _place(inputs, pipeline.DiTInputs(conditioning, context))
    state = _place(state, jax.tree.map(functools.partial(_by_row, made), state))
    stop = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
    rows = branches * batch_size
    latents = state.latents.shape
    image_tokens = config.image_encoder.num_tokens if config.dit.image_dim and config.image_encoder else 0
    return Program(
        "sampling step",
        target,
        made,
        trace=functools.partial(pipeline._advance.trace, **static["advance"]),
        arguments=(params["dit"], inputs, state, stop, None),
        memory={
            "parameters": shard_bytes(params["dit"]),
            "inputs": shard_bytes((inputs, state)),
            "encoders": shard_bytes({name: tree for name, tree in params.items() if name != "dit"}),
        },
        settings={
            "videos": batch_size,
            "branches": branches,
            "size": f"{config.sampling.width}x{config.sampling.height}x{config.sampling.num_frames}",
            "dtype": config.dit.dtype,
            "attention": config.dit.attention,
            "solver steps": config.sampling.num_inference_steps,
        },
        flops=float(rows * dit_flops(config.dit, _num_tokens(config, latents), text_tokens + image_tokens)),
        recomputed_flops=0.0,
        rows=rows,
    )


def compile_program(program: Program) -> Plan:
    """Lowers and compiles the program, and reads off it what was not known before.

    Raises:
        RuntimeError: the compiler refuses it, but for lack of memory: then the plan says so.
    """
    start, mesh, known = time.perf_counter(), program.mesh, shard_bytes(program.arguments)
    failure, temporaries, counted, found, unknown, memory = None, None, None, (), 0, dict(program.memory)
    traffic, on_tpu = known, program.target.chip.platform == "tpu"
    for_gpu = program.target.chip.platform == "gpu"
    with jax.set_mesh(mesh):
        # What is written differently for a CPU is of no use on a GPU.
        lowered = program.trace(*program.arguments).lower(lowering_platforms=("cuda",) if for_gpu else None)
    try:
        compiled = lowered.compile(STAND_IN if for_gpu else None)
    except jax.errors.JaxRuntimeError as error:
        failure, temporaries = _out_of_memory(str(error), known)
    else:
        stats, text = compiled.memory_analysis(), compiled.as_text()
        if stats is None or text is None:
            raise RuntimeError(f"The compiler of {program.target.name} says neither memory nor program.")
        # Donated arguments are outputs; layouts of arguments may need more than their shapes say.
        padding = max(0, stats.argument_size_in_bytes - known)
        memory["outputs and layouts"] = padding + stats.output_size_in_bytes - stats.alias_size_in_bytes
        temporaries = stats.temp_size_in_bytes
        traffic = stats.argument_size_in_bytes + stats.output_size_in_bytes + 2 * temporaries
        found, unknown = parse_collectives(text)
        counted = None if on_tpu else count_flops(text)[0]
    cut, chip = mesh.shape["data"] * mesh.shape["fsdp"], program.target.chip
    return Plan(
        step=program.step,
        topology=program.target.name,
        mesh=dict(mesh.shape),
        settings=program.settings,
        compiled_for="tpu" if on_tpu else "cpu",
        memory=memory,
        temporaries=temporaries,
        memory_traffic=traffic,
        capacity=chip.memory,
        flops=program.flops,
        recomputed_flops=program.recomputed_flops,
        counted_flops=counted,
        collectives=found,
        loops_of_unknown_length=unknown,
        compile_seconds=time.perf_counter() - start,
        chips_at_work=(cut if program.rows % cut == 0 else 1) * mesh.shape["context"] * mesh.shape["tensor"],
        failure=failure,
    )


def _out_of_memory(message: str, arguments: int) -> tuple[str, int | None]:
    """What the TPU compiler says when a program does not fit, and the temporaries in that.

    Raises:
        RuntimeError: it failed for another reason.
    """
    total = re.search(r"Used ([\d.]+)([KMG]) of ([\d.]+)([KMG]) hbm", message)
    of_temporaries = re.search(
        r"HLO temporaries \(([\d.]+)([KMG])\) exceeds available HBM \(([\d.]+)([KMG])\)", message
    )
    found = total or of_temporaries
    if found is None:
        if "RESOURCE_EXHAUSTED" not in message:
            raise RuntimeError(message)
        return message.splitlines()[0], None
    scale = {"K": 2**10, "M": 2**20, "G": GIB}
    needed, most = float(found[1]) * scale[found[2]], float(found[3]) * scale[found[4]]
    kind = "in all" if total else "for temporaries"
    reason = f"the compiler needs {needed / GIB:.2f} GiB {kind} and has {most / GIB:.2f} GiB"
    return reason, max(0, round(needed) - (arguments if total else 0))


def _attention(config: ModelConfig, target: Topology, asked: str | None) -> str:
    """What "auto" is on the chip; where the CPU stands for it, what needs as little memory as the chip's own."""
    name = asked or config.dit.attention
    automatic = {"tpu": "splash", "gpu": "blockwise", "cpu": "cpu"}
    if target.chip.platform == "gpu" and name == "cudnn":
        return automatic["gpu"]
    return automatic[target.chip.platform] if name == "auto" else name


def _place(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree, shardings
    )


def _by_row(mesh: Mesh, leaf: Any) -> NamedSharding:
    """Over the axes of the batch where they divide it, as `sharding.shard_batch` does."""
    is_divided = leaf.ndim > 0 and leaf.shape[0] % (mesh.shape["data"] * mesh.shape["fsdp"]) == 0
    return NamedSharding(mesh, P(("data", "fsdp")) if is_divided else P())


CONTEXT = ("layers", "batch", "text", "heads")  # dimensions of the keys and values that `encode_context` makes


def _by_name(mesh: Mesh, names: tuple[str, ...], leaf: Any) -> NamedSharding:
    return NamedSharding(mesh, activation_spec(mesh.abstract_mesh, leaf.shape, names))


def _stored(mesh: Mesh, abstract: Mapping[str, Params]) -> dict[str, Any]:
    """The networks of a model folder on the mesh, bfloat16, as the converter writes them."""
    return {
        name: jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16, sharding=sharding),
            tree,
            param_shardings(mesh, tree, PARAM_SPECS[name]),
        )
        for name, tree in abstract.items()
    }


def _trainable(task: DiTTask, model: ModelConfig, dit: Params) -> tuple[Params, Params, Any, Any]:
    """As `dit_task.choose_trainable`, of shapes: trained, frozen, their table, and how both are one model again."""
    if isinstance(task.trainable, LoraConfig):
        lora_config = task.trainable
        lora = jax.eval_shape(functools.partial(init_lora, model.dit, lora_config), jax.random.key(0))
        return lora, dit, PARAM_SPECS["lora"], lambda lora, dit: (dit, scale_lora(lora_config, lora))
    trained, rest = split_params(dit, task.trainable)
    return trained, rest, PARAM_SPECS["dit"], lambda trained, rest: (join_params(trained, rest), None)


def _case_arrays(config: ModelConfig, rows: int, text_tokens: int) -> tuple[dict[str, Any], Any]:
    """Shapes of what `conditioning.case.stack_cases` gives at the sampling size, and of noise."""
    sampling, vae, patch = config.sampling, config.vae, config.dit.patch_size
    latents = (
        vae.num_latent_frames(sampling.num_frames),
        sampling.height // vae.spatial_stride,
        sampling.width // vae.spatial_stride,
    )
    frame_tokens = (latents[1] // patch[1]) * (latents[2] // patch[2])
    shapes: dict[str, tuple[tuple[int, ...], Any]] = {
        "token_ids": ((text_tokens,), jnp.int32),
        "attention_mask": ((text_tokens,), jnp.int32),
        "region_mask": ((*latents, 4), jnp.float32),
        "subject_tokens": ((8, text_tokens), jnp.float32),
        "subject_regions": ((8, frame_tokens), jnp.float32),
        "canvas": ((sampling.height, sampling.width, 3), jnp.uint8),
    }
    arrays = {name: jax.ShapeDtypeStruct((rows, *shape), dtype) for name, (shape, dtype) in shapes.items()}
    return arrays, jax.ShapeDtypeStruct((rows, *latents, vae.latent_channels), jnp.float32)


def _batch(config: TrainConfig, model: ModelConfig, batch_size: int | None) -> tuple[Batch, Null]:
    """Shapes of the third argument of the loss and of what dropped conditioning becomes."""
    task = config.task
    assert isinstance(task, DiTTask)
    length = model.vae.num_latent_frames(model.sampling.num_frames)
    kept = [(phase.batch_size, min(phase.num_latent_frames or length, phase.reach or length)) for phase in task.phases]
    rows, frames = max(kept, key=math.prod)
    rows = rows if batch_size is None else batch_size
    arrays, noise = _case_arrays(model, rows, model.dit.text_len)
    clip = (rows, model.sampling.num_frames, model.sampling.height, model.sampling.width, 3)
    pixels = arrays | {"frames": jax.ShapeDtypeStruct(clip, jnp.uint8)}
    encoded = jax.eval_shape(functools.partial(encode_batch, model), pipeline.abstract_params(model), pixels)
    blank = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), encoded)
    null = Null(blank["text_embeddings"], blank.get("reference_latents"), blank.get("image_embeddings"))
    encoded["subject_cells"] = jax.ShapeDtypeStruct(noise.shape[:-1], jnp.float32)
    for name in ("clean_latents", "reference_latents", "region_mask", "subject_cells"):
        if name in encoded:
            shape = encoded[name].shape
            encoded[name] = jax.ShapeDtypeStruct((rows, frames, *shape[2:]), encoded[name].dtype)
    return as_batch(encoded, tuple(range(frames))), null


def _num_tokens(config: ModelConfig, latents: Sequence[int]) -> int:
    return math.prod(latents[1:4]) // math.prod(config.dit.patch_size)


def mesh_candidates(num_devices: int, rows: int, config: ModelConfig, most_tensor: int = 8) -> list[str]:
    """Meshes that use every device and divide the rows of a batch and the heads."""
    divisors = [size for size in range(1, num_devices + 1) if num_devices % size == 0]
    found = []
    for data, fsdp, context, tensor in itertools.product(divisors, repeat=len(MESH_AXES)):
        fits = rows % (data * fsdp) == 0 and config.dit.num_heads % (context * tensor) == 0 and tensor <= most_tensor
        if data * fsdp * context * tensor == num_devices and fits:
            sizes = zip(MESH_AXES, (data, fsdp, context, tensor), strict=True)
            found.append(",".join(f"{axis}={size}" for axis, size in sizes if size > 1))
    return found


def rank(plans: Iterable[Plan]) -> list[Plan]:
    """What fits first, then what is fastest at best, then what needs least."""
    return sorted(plans, key=lambda plan: (plan.fits is False, plan.bound or 0.0, plan.used))


def ranking(plans: Sequence[Plan]) -> str:
    """Plans of one step as a Markdown table, in the order given."""
    lines = [
        "| mesh | remat | attention | memory of a chip | fits | a step, at least |",
        "| --- | --- | --- | --: | --- | --: |",
    ]
    for plan in plans:
        cut = ",".join(f"{axis}={size}" for axis, size in plan.mesh.items() if size > 1) or "one device"
        fits = {True: "yes", False: "no", None: "unknown"}[plan.fits]
        part = f", {plan.used / plan.capacity:.0%}" if plan.capacity else ""
        bound = "" if plan.bound is None else f"{plan.bound:.3g} s"
        remat, attention = (plan.settings.get(name, "") for name in ("remat", "attention"))
        lines.append(f"| `{cut}` | {remat} | {attention} | {plan.used / GIB:.1f} GiB{part} | {fits} | {bound} |")
    return "\n".join(lines)


def auto_training(
    config: TrainConfig,
    topology: str,
    *,
    model: ModelConfig | None = None,
    batch_size: int | None = None,
    remats: Sequence[Remat] = ("dots", "block"),
    most: int = 8,
    **options: Any,
) -> list[Plan]:
    """Plans of the meshes and remat policies that may be best, best first; each takes a compilation, `most` of them."""
    task = config.task
    if not isinstance(task, DiTTask):
        raise ValueError("config trains the VAE; only the training of a DiT can be planned.")
    target = parse_topology(topology)
    known = model or _trained_model(task)
    rows = batch_size or max(phase.batch_size for phase in task.phases)
    meshes = _promising(
        mesh_candidates(target.num_devices, rows // config.accumulation_steps, known), most // len(remats)
    )
    plan = functools.partial(plan_training, config, topology, model=model, batch_size=batch_size, **options)
    return rank(plan(mesh, remat=remat) for mesh in meshes for remat in remats)


def auto_sampling(
    config: ModelConfig, topology: str, *, batch_size: int = 1, most: int = 8, **options: Any
) -> list[Plan]:
    """As `auto_training`, for a solver's step."""
    target = parse_topology(topology)
    rows = batch_size * len(pipeline.guidance(config))
    meshes = _promising(mesh_candidates(target.num_devices, rows, config), most)
    return rank(plan_sampling(config, topology, mesh, batch_size=batch_size, **options) for mesh in meshes)


def _promising(meshes: Sequence[str], most: int) -> list[str]:
    """Parameters cut over many chips before copies of them, and of the axes inside a layer, the small sizes first."""

    def cost(mesh: str) -> tuple[int, int]:
        sizes = dict.fromkeys(MESH_AXES, 1) | {
            axis: int(size) for axis, _, size in (part.partition("=") for part in mesh.split(",") if part)
        }
        return sizes["data"], sizes["context"] * sizes["tensor"] ** 2

    return sorted(meshes, key=cost)[:most]


def model_to_plan(folder: pathlib.Path) -> ModelConfig:
    """The config of a model folder, or of `RELEASED`, which is a name and no folder.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it holds something else.
    """
    if str(folder) == RELEASED:
        return ModelConfig()
    try:
        return load_model_config(folder)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{error} {RELEASED} in its place plans the released 14B without its weights."
        ) from None


def _trained_model(task: DiTTask) -> ModelConfig:
    """What a preset trains; the model folder of one that says all of its model need not be there yet."""
    if task.model is not None and (str(task.folder) == RELEASED or not task.folder.exists()):
        return task.model
    stored = model_to_plan(task.folder)
    return stored if task.model is None else model_config(task)


def report_training(config: TrainConfig, topology: str, mesh: str, file: pathlib.Path | None) -> str:
    """What `train.py --plan` prints and writes: a plan of this mesh, or of `auto` those that may be best."""
    use_cpu(parse_topology(topology))
    plans = auto_training(config, topology) if mesh == "auto" else [plan_training(config, topology, mesh or "fsdp=-1")]
    task = config.task
    return _report(plans, str(task.folder) if isinstance(task, DiTTask) else "", file)


def report_sampling(
    folder: pathlib.Path,
    topology: str,
    mesh: str,
    batch_size: int,
    file: pathlib.Path | None,
    *,
    dtype: DType | None = None,
    **sampling: Any,
) -> str:
    """As `report_training`, for `sample.py --plan`; `folder` may be `RELEASED`.

    `dtype` and `sampling`, fields of `SamplingConfig`, are in place of the folder's.
    """
    target, model = parse_topology(topology), with_dtype(model_to_plan(folder), dtype)
    use_cpu(target)
    config = pipeline.with_sampling(model, **sampling)
    if mesh == "auto":
        plans = auto_sampling(config, topology, batch_size=batch_size)
    else:
        plans = [plan_sampling(config, topology, mesh or "fsdp=-1", batch_size=batch_size)]
    return _report(plans, str(folder), file)


def _report(plans: Sequence[Plan], model: str, file: pathlib.Path | None) -> str:
    plans = [dataclasses.replace(plan, settings={"model": model} | dict(plan.settings)) for plan in plans]
    if file is not None:
        with replacing(file) as part:
            part.write_text(plans[0].to_json(), encoding="utf-8")
    return "\n\n".join(([ranking(plans)] if len(plans) > 1 else []) + [plans[0].table()])
