"""What a run would do, without its weights: pictures of what the model will see, and what it will cost.

OUT/dry_run/KEY_canvas.png    the canvas with the place and the words of each reference
OUT/dry_run/KEY_mask.png      the same canvas, coloured where the mask channels of the transformer say "known"
"""

import dataclasses
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from magref_jax import checkpoint, pipeline
from magref_jax.batches import PlannedCase
from magref_jax.conditioning.canvas import draw_regions
from magref_jax.conditioning.case import Case
from magref_jax.config import ModelConfig, SamplingConfig
from magref_jax.diffusion.step_cache import StepPlan
from magref_jax.files import replacing
from magref_jax.models.dit import dit_flops

TINT = np.array((230, 60, 40))  # of cells that are known
UNKNOWN = 0.25  # how much is left of the canvas where everything is to be generated


def dry_run(
    folder: pathlib.Path,
    config: ModelConfig,
    tokenizer: Any,
    work: Sequence[Sequence[PlannedCase]],
    out: pathlib.Path,
    *,
    mesh: Mesh | None,
    batch_size: int,
    text_tokens: int,
    step_plan: StepPlan | None,
) -> None:
    """Draws every case and prints, for each compiled shape, its sizes, floating point operations and memory."""
    folder_of_pictures = out / "dry_run"
    for batch in work:
        for planned in batch:
            sampling = dataclasses.asdict(planned.sampling)
            request = planned.request()
            case = pipeline.prepare(pipeline.with_sampling(config, **sampling), tokenizer, request)
            words = [reference["words"] or "" for reference in planned.settings["references"]]
            pictures = {"canvas": draw_regions(case.canvas, words), "mask": draw_mask(case, words)}
            for name, picture in pictures.items():
                with replacing(folder_of_pictures / f"{planned.key}_{name}.png") as part:
                    picture.save(part, format="PNG")
    print(f"drew {2 * sum(map(len, work))} pictures in {folder_of_pictures}")

    params = stored_shapes(folder, config, mesh)
    options = {"mesh": mesh, "batch_size": batch_size, "text_tokens": text_tokens, "step_plan": step_plan}
    for shaped, batches in by_shape(config, work):
        lowered = pipeline.lower(shaped, tokenizer, params, batches[0][0].request(), **options)
        lines = describe(shaped, batches, text_tokens, step_plan) | memory(params, lowered)
        width = max(map(len, lines))
        print()
        for name, value in lines.items():
            print(f"{name:{width}}  {value}")


def stored_shapes(folder: pathlib.Path, config: ModelConfig, mesh: Mesh | None) -> dict[str, Any]:
    """The parameters of a model folder as shapes, with their dtypes and where a mesh holds them."""
    abstract = pipeline.place_params(mesh, pipeline.abstract_params(config))
    return {name: checkpoint.stored_params(folder / name, tree) for name, tree in abstract.items()}


def by_shape(
    config: ModelConfig, work: Sequence[Sequence[PlannedCase]]
) -> Iterator[tuple[ModelConfig, list[Sequence[PlannedCase]]]]:
    """The config and the batches of each compiled shape."""
    shapes: dict[Any, list[Sequence[PlannedCase]]] = {}
    for batch in work:
        shapes.setdefault(dataclasses.replace(batch[0].sampling, negative_prompt=""), []).append(batch)
    for sampling, batches in shapes.items():
        yield pipeline.with_sampling(config, **dataclasses.asdict(sampling)), batches


def check_memory(
    folder: pathlib.Path,
    config: ModelConfig,
    tokenizer: Any,
    work: Sequence[Sequence[PlannedCase]],
    *,
    usual: SamplingConfig,
    mesh: Mesh | None,
    **options: Any,
) -> None:
    """Refuses what needs more memory than there is.

    A model at its `usual` size is held against its parameters alone; what is larger is compiled, which takes as long as it
    takes in the run, that finds the programs in the cache.

    Raises:
        ValueError: says how much is needed, and what needs less.
    """
    free = free_memory(mesh)
    try:
        params = stored_shapes(folder, config, mesh)
    except (ValueError, OSError):  # whoever reads the parameters will say so
        return
    if free is None:
        return
    if (stored := sum(map(_device_bytes, jax.tree.leaves(params)))) > free:
        raise ValueError(
            f"the parameters of {folder} take {_number(stored)}B per device, of which {_number(free)}B are free: --mesh cuts "
            "them over several devices."
        )
    for shaped, batches in by_shape(config, work):
        if _pixels(shaped.sampling) <= _pixels(usual):
            continue
        lowered = pipeline.lower(shaped, tokenizer, params, batches[0][0].request(), mesh=mesh, **options)
        needs = memory_needs(params, lowered)
        if needs and stored + max(needs.values()) > free:
            stage, size = max(needs, key=lambda name: needs[name]), shaped.sampling
            raise ValueError(
                f"{size.width}x{size.height} pixels, {size.num_frames} frames: {stage} takes {_number(stored + needs[stage])}B "
                f"per device, of which {_number(free)}B are free; this model is made for {usual.width}x{usual.height}, "
                f"{usual.num_frames} frames. Less is needed by a smaller --size, fewer --frames, a smaller --batch_size or "
                "more devices in --mesh."
            )


def _pixels(sampling: SamplingConfig) -> int:
    return sampling.height * sampling.width * sampling.num_frames


def free_memory(mesh: Mesh | None) -> int | None:
    """Bytes that programs may still take of a device of the mesh; of CPU devices, a share of the machine's. None: unknown."""
    device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
    stats = device.memory_stats() if device.platform != "cpu" else None
    if stats is not None and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    meminfo = pathlib.Path("/proc/meminfo")
    if device.platform != "cpu" or not meminfo.exists():
        return None
    available = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text())
    limits = [int(available[1]) * 1024] if available else []
    container = pathlib.Path("/sys/fs/cgroup/memory.max")
    if container.exists() and (limit := container.read_text().strip()).isdecimal():
        limits.append(int(limit))
    return min(limits) // (1 if mesh is None else mesh.size) if limits else None


def draw_mask(case: Case, words: Sequence[str], min_width: int = 960) -> Image.Image:
    """The canvas in colour where the mask of latent frame 0 is 1, nearly white elsewhere, with the regions and words on it."""
    mask = case.region_mask[0, :, :, 0]
    stride = len(case.canvas.image) // len(mask)
    known = mask.repeat(stride, axis=0).repeat(stride, axis=1)[..., None]
    image = case.canvas.image.astype(np.float32)
    tinted = 0.6 * image + 0.4 * TINT
    faded = 255 - UNKNOWN * (255 - image)
    mixed = np.where(known == 1, tinted, faded).round().astype(np.uint8)
    return draw_regions(dataclasses.replace(case.canvas, image=mixed), words, min_width)


def describe(
    config: ModelConfig, batches: Sequence[Sequence[PlannedCase]], text_tokens: int, step_plan: StepPlan | None
) -> dict[str, str]:
    """Sizes and operations of one compiled shape."""
    sampling, dit, vae = config.sampling, config.dit, config.vae
    latents = (
        vae.num_latent_frames(sampling.num_frames),
        sampling.height // vae.spatial_stride,
        sampling.width // vae.spatial_stride,
    )
    tokens = int(np.prod([size // patch for size, patch in zip(latents, dit.patch_size, strict=True)]))
    image_tokens = 0 if config.image_encoder is None else config.image_encoder.num_tokens
    branches = len(pipeline.guidance(config))
    evaluations = sampling.num_inference_steps if step_plan is None else step_plan.num_evaluations
    per_step = branches * dit_flops(dit, tokens, text_tokens + image_tokens)
    num_cases = sum(map(len, batches))
    return {
        "size": f"{sampling.width}x{sampling.height}, {sampling.num_frames} frames, "
        f"{sampling.num_frames - config.drop_frames} after the canvas is dropped",
        "cases": f"{num_cases} in {len(batches)} batch{'' if len(batches) == 1 else 'es'}",
        "latents": " x ".join(map(str, (*latents, vae.latent_channels))),
        "tokens": f"{tokens} video, {text_tokens} text (of {dit.text_len}, the rest is padding), {image_tokens} image",
        "steps": f"{sampling.num_inference_steps} of {sampling.solver}, {evaluations} of them with the network, "
        f"{branches} branch{'' if branches == 1 else 'es'} of guidance",
        "operations": f"{_number(per_step)}FLOP per step and case, {_number(per_step * evaluations * num_cases)}FLOP in all",
    }


def memory(params: dict[str, Any], lowered: dict[str, jax.stages.Lowered]) -> dict[str, str]:
    """Bytes on the fullest device, as the compiler plans them: parameters, and what each program needs besides."""
    stored = sum(map(_device_bytes, jax.tree.leaves(params)))
    needs = memory_needs(params, lowered)
    parts = ", ".join(f"{name} {_number(value)}B" for name, value in needs.items())
    total = stored + max(needs.values(), default=0)
    return {"memory": f"{_number(total)}B per device: parameters {_number(stored)}B, then at most {parts}"}


def memory_needs(params: dict[str, Any], lowered: dict[str, jax.stages.Lowered]) -> dict[str, int]:
    """Bytes of a device that each program needs besides the parameters, as its compiler plans them."""
    used = {"encoding": ("dit", "vae", "text_encoder", "image_encoder"), "sampling": ("dit",), "decoding": ("vae",)}
    needs = {}
    for name, program in lowered.items():
        plan = program.compile().memory_analysis()
        if plan is None:  # a platform that does not say
            continue
        inputs = sum(_device_bytes(leaf) for network in used[name] for leaf in jax.tree.leaves(params.get(network, ())))
        other = max(0, plan.argument_size_in_bytes - inputs)
        needs[name] = other + plan.temp_size_in_bytes + plan.output_size_in_bytes
    return needs


def _device_bytes(leaf: jax.ShapeDtypeStruct) -> int:
    shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
    return int(np.prod(shape)) * leaf.dtype.itemsize


def _number(value: float) -> str:
    for prefix in ("", "k", "M", "G", "T", "P"):
        if value < 1000:
            return f"{value:.3g} {prefix}"
        value /= 1000
    return f"{value:.3g} E"
