"""Where arrays live: one mesh with four named axes, and one table per network that says how its parameters are cut.

    data      copies of the model, each with its share of the batch
    fsdp      share the batch too
    context   cut the video tokens of one sample
    tensor    cut the width of the layers

Parameters are cut over `fsdp` and `context`, and gathered layer by layer.

All four axes always exist, of size 1 where unused, so that one code path serves a laptop and a pod. What used to be called
pjit is `jax.jit` on arrays with these shardings.
"""

import collections
import contextlib
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

MESH_AXES = ("data", "fsdp", "context", "tensor")

ParamSpecs = tuple[tuple[str, P], ...]  # (regular expression of a whole parameter path, how its dimensions are cut)


def make_mesh(spec: str = "", devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of a text such as "data=2,fsdp=-1"; axes that are not named have size 1, and -1 takes what is left.

    Of several slices of TPUs or nodes of GPUs, `data` goes over the slices, over those that it does not divide `fsdp`, and then
    `context`: what exchanges least goes furthest.

    Raises:
        ValueError: an unknown or repeated axis, no whole number, sizes that do not use every device exactly once, or that
            would have `tensor` leave a slice.
    """
    given, devices = devices is not None, jax.devices() if devices is None else list(devices)
    sizes = dict.fromkeys(MESH_AXES, 1)
    named = []
    for part in filter(None, (part.strip() for part in spec.split(","))):
        axis, equals, size = (text.strip() for text in part.partition("="))
        if axis not in MESH_AXES:
            raise ValueError(f"mesh={spec!r} names the axis {axis!r}; the axes are {', '.join(MESH_AXES)}.")
        if axis in named:
            raise ValueError(f"mesh={spec!r} names the axis {axis!r} twice.")
        if not equals or not re.fullmatch(r"-1|0*[1-9][0-9]*", size):
            raise ValueError(f"mesh={spec!r}: {part!r} must be AXIS=SIZE with a size of 1 or more, or -1 for the rest.")
        named.append(axis)
        sizes[axis] = int(size)
    rest = [axis for axis, size in sizes.items() if size == -1]
    if len(rest) > 1:
        raise ValueError(f"mesh={spec!r} leaves both {' and '.join(rest)} open; at most one axis may be -1.")
    known = math.prod(size for size in sizes.values() if size != -1)
    if rest and len(devices) % known == 0:
        sizes[rest[0]] = len(devices) // known
    if math.prod(sizes.values()) != len(devices):
        asked = " x ".join(f"{axis}={size}" for axis, size in sizes.items() if size != 1) or "1 device"
        # A CPU is one device, unless one says otherwise before JAX starts.
        more = f" JAX_NUM_CPU_DEVICES={known} in the environment makes so many of a CPU."
        hint = more if not given and not rest and devices[0].platform == "cpu" else ""
        raise ValueError(
            f"mesh={spec!r} means {asked}, which does not use the {len(devices)} devices exactly once.{hint}"
        )
    # Auto: in the default, explicit mode Linen layers refuse a contraction over a cut dimension.
    types = (AxisType.Auto,) * len(MESH_AXES)
    return Mesh(_arrange(spec, sizes, devices), MESH_AXES, axis_types=types)


def _arrange(spec: str, sizes: Mapping[str, int], devices: Sequence[jax.Device]) -> np.ndarray:
    """The devices as the axes have them: neighbours of a torus beside each other, whole slices along the first axes."""
    # Devices with fast links to each other: a slice of TPUs, the GPUs of a node. Between slices is the data-centre network.
    slices = collections.Counter(getattr(device, "slice_index", 0) for device in devices)
    over, rest = dict.fromkeys(sizes, 1), len(slices)  # how many slices each axis goes over
    for axis in ("data", "fsdp", "context"):
        over[axis] = math.gcd(sizes[axis], rest)
        rest //= over[axis]
    if rest > 1 or len(set(slices.values())) != 1:
        held = " or ".join(str(number) for number in sorted(set(slices.values())))
        raise ValueError(
            f"mesh={spec!r} does not fit {len(slices)} slices of {held} devices: they must be of one size, and data x fsdp x "
            f"context, here {sizes['data']} x {sizes['fsdp']} x {sizes['context']}, a multiple of their number. tensor does not "
            "leave a slice."
        )
    within = [size // over[axis] for axis, size in sizes.items()]
    # jax.make_mesh refuses axes that take a part of a torus dimension, such as fsdp=16,context=4 on 8x8 chips.
    if len(slices) == 1:
        return mesh_utils.create_device_mesh(within, devices, allow_split_physical_axes=True)
    return mesh_utils.create_hybrid_device_mesh(within, list(over.values()), devices, allow_split_physical_axes=True)


# Devices that share a sample need all of the layers just as those with other samples do: parameters are cut over both.
CUT = ("fsdp", "context")

# A layer that widens is cut at its output by `tensor`, the one that follows it at its input: between them, no exchange.
_WIDEN = r"(query|key|value|key_image|value_image|up|gate)"
_NARROW = r"(out|down)"

DIT_PARAM_SPECS: ParamSpecs = (
    (rf"blocks/\w+/{_WIDEN}/kernel", P(None, CUT, "tensor")),
    (rf"blocks/\w+/{_WIDEN}/bias", P(None, "tensor")),
    (rf"blocks/\w+/{_NARROW}/kernel", P(None, "tensor", CUT)),
    (rf"blocks/\w+/{_NARROW}/bias", P()),
    (r"(patch_embedding|(text|time|image)_(in|out)|time_modulation)/kernel", P(CUT, "tensor")),
    (r"head/out/kernel", P(CUT, None)),
    (r"(patch_embedding|(text|time|image)_(in|out)|time_modulation|head/out)/bias", P()),
    (r"(blocks|head)/modulation", P()),
    (r"(blocks/(\w+/)?|image_(in|out)_)\w*norm/(scale|bias)", P()),
)

TEXT_ENCODER_PARAM_SPECS: ParamSpecs = (
    (r"token_embedding", P(None, (*CUT, "tensor"))),
    (rf"blocks/\w+/{_WIDEN}/kernel", P(None, CUT, "tensor")),
    (rf"blocks/\w+/{_NARROW}/kernel", P(None, "tensor", CUT)),
    (r"blocks/self_attention/relative_bias", P(None, None, "tensor")),
    (r"(blocks/\w+_)?norm/scale", P()),
)

IMAGE_ENCODER_PARAM_SPECS: ParamSpecs = (
    (r"patch_embedding/kernel|class_embedding|position_embedding", P()),
    (rf"blocks/\w+/{_WIDEN}/kernel", P(None, CUT, "tensor")),
    (rf"blocks/\w+/{_WIDEN}/bias", P(None, "tensor")),
    (rf"blocks/\w+/{_NARROW}/kernel", P(None, "tensor", CUT)),
    (rf"blocks/\w+/{_NARROW}/bias", P()),
    (r"(blocks/\w+|input)_norm/(scale|bias)", P()),
)

# The VAE is 1 % of the model.
VAE_PARAM_SPECS: ParamSpecs = ((r"(encoder|decoder|quant|post_quant)/.*", P()),)

# The thin side of an adapter is on every device; the other is cut like the kernel it stands beside.
LORA_PARAM_SPECS: ParamSpecs = (
    (rf"blocks/\w+/{_WIDEN}/a", P(None, CUT, None)),
    (rf"blocks/\w+/{_WIDEN}/b", P(None, None, "tensor")),
    (rf"blocks/\w+/{_NARROW}/a", P(None, "tensor", None)),
    (rf"blocks/\w+/{_NARROW}/b", P(None, None, CUT)),
    (r"((text|time|image)_(in|out)|time_modulation|head/out)/a", P(CUT, None)),
    (r"((text|time|image)_(in|out)|time_modulation)/b", P(None, "tensor")),
    (r"head/out/b", P()),
)

PARAM_SPECS: Mapping[str, ParamSpecs] = {
    "dit": DIT_PARAM_SPECS,
    "vae": VAE_PARAM_SPECS,
    "text_encoder": TEXT_ENCODER_PARAM_SPECS,
    "image_encoder": IMAGE_ENCODER_PARAM_SPECS,
    "lora": LORA_PARAM_SPECS,
}


def param_specs(abstract_params: Any, specs: ParamSpecs) -> Any:
    """The entry of the table for every parameter, as a tree.

    Raises:
        ValueError: a parameter matches no entry or several, or has fewer dimensions than its entry.
    """

    def find(path: tuple[Any, ...], leaf: Any) -> P:
        name = "/".join(str(key.key) for key in path)
        found = [(pattern, spec) for pattern, spec in specs if re.fullmatch(pattern, name)]
        if len(found) != 1:
            patterns = "; ".join(pattern for pattern, _ in found) or "none"
            raise ValueError(f"Parameter {name!r} must match exactly one sharding spec, it matches: {patterns}.")
        if len(found[0][1]) > leaf.ndim:
            raise ValueError(f"Parameter {name!r} of shape {leaf.shape} has fewer dimensions than {found[0][1]}.")
        return found[0][1]

    return jax.tree.map_with_path(find, abstract_params)


def param_shardings(mesh: Mesh, abstract_params: Any, specs: ParamSpecs) -> Any:
    """How `mesh` holds each parameter; of the mesh axes that cut a dimension, the last give way where they do not divide it.

    Raises:
        ValueError: see `param_specs`.
    """

    def shard(leaf: Any, spec: P) -> NamedSharding:
        axes = []
        for size, names in zip(leaf.shape, spec, strict=False):
            group = _dividing(mesh, size, (names,) if isinstance(names, str) else tuple(names or ()))
            axes.append(group[0] if len(group) == 1 else group or None)
        return NamedSharding(mesh, P(*axes))

    return jax.tree.map(shard, abstract_params, param_specs(abstract_params, specs))


def _dividing(mesh: Mesh | AbstractMesh, size: int, group: tuple[str, ...]) -> tuple[str, ...]:
    """The axes of the group without the last ones that do not divide the size together with those before them."""
    while group and size % math.prod(mesh.shape[axis] for axis in group):
        group = group[:-1]
    return group


def batch_multiple(mesh: Mesh | None, branches: int = 1) -> int:
    """What the batch size must be a multiple of if each sample is computed in so many branches."""
    if mesh is None:
        return 1
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    return devices // math.gcd(devices, branches)


def _batch_shardings(mesh: Mesh, tree: Any, axis: int) -> Any:
    def shard(leaf: Any) -> NamedSharding:
        is_divided = leaf.ndim > axis and leaf.shape[axis] % (mesh.shape["data"] * mesh.shape["fsdp"]) == 0
        return NamedSharding(mesh, P(*[None] * axis, ("data", "fsdp")) if is_divided else P())

    return jax.tree.map(shard, tree)


def shard_batch(mesh: Mesh | None, tree: Any, axis: int = 0) -> Any:
    """The arrays on the mesh, their batch dimension over `data` and `fsdp`, whole where these do not divide it.

    Every process gives whole batches, the same ones; see also `distributed.shard_rows`.
    """
    if mesh is None:
        return tree
    shardings = _batch_shardings(mesh, tree, axis)
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)
    # device_put would have every process send its arrays to all others, to compare them.
    return jax.tree.map(
        lambda leaf, sharding: jax.make_array_from_callback(leaf.shape, sharding, leaf.__getitem__), tree, shardings
    )


def constrain_batch(mesh: Mesh | None, tree: Any, axis: int = 0) -> Any:
    """As `shard_batch`, inside `jax.jit`."""
    return tree if mesh is None else jax.lax.with_sharding_constraint(tree, _batch_shardings(mesh, tree, axis))


# The dimensions of activations, and the axes of the mesh that cut them.
ACTIVATION_AXES: Mapping[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "tokens": ("context",),  # of video; a sample's text and image tokens are on every device
    "heads": ("tensor",),  # also the width that is about to be split into heads
    "hidden": ("tensor",),  # between the two layers of a feed-forward
    # The longer side of a frame in the VAE, or all its positions one after the other: over the axes that the batch leaves.
    "space": ("context", "tensor", "fsdp", "data"),
    "side": (),  # what is whole of either
    "channels": (),
    "width": (),
    "head_width": (),
    "layers": (),
    "frames": (),
    "text": (),
}


def on_mesh(mesh: Mesh | None) -> contextlib.AbstractContextManager[Any]:
    """What is traced inside is for arrays on this mesh: `constrain` and the attention of the DiT find it.

    For the body of a function that `jax.jit` traces. `jax.set_mesh` around the call does the same.
    """
    return contextlib.nullcontext() if mesh is None else jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def current_mesh() -> AbstractMesh | None:
    """The mesh of `on_mesh` or `jax.set_mesh`; None without one, and where there is nothing to distribute."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 else mesh


def activation_spec(mesh: AbstractMesh, shape: Sequence[int], names: Sequence[str]) -> P:
    """How the mesh cuts an array with these dimensions, each with axes that none before it has.

    Of the axes of one dimension, the last give way where they do not divide it.

    Raises:
        KeyError: a name that `ACTIVATION_AXES` does not have.
        ValueError: not one name per dimension.
    """
    if len(shape) != len(names):
        raise ValueError(f"An array of shape {tuple(shape)} needs a name for each dimension, not {', '.join(names)}.")
    axes, taken = [], set()
    for size, name in zip(shape, names, strict=True):
        group = _dividing(mesh, size, tuple(axis for axis in ACTIVATION_AXES[name] if axis not in taken))
        taken.update(group)
        axes.append(group[0] if len(group) == 1 else group or None)
    return P(*axes)


def constrain(x: Array, *names: str, shape: Sequence[int] | None = None) -> Array:
    """The array, its dimensions cut over the current mesh as `ACTIVATION_AXES` says; itself where there is no mesh.

    With a `shape` it is cut as an array of that shape would be.

    Raises:
        KeyError, ValueError: see `activation_spec`.
    """
    mesh = current_mesh()
    if mesh is None:
        for name in names:
            ACTIVATION_AXES[name]
        return x
    spec = activation_spec(mesh, x.shape if shape is None else shape, names)
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))
