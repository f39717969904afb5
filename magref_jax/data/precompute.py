"""Runs the frozen encoders over records once, so that training reads what they say instead of pixels.

    python -m magref_jax.data.precompute records --model MODEL --out encoded --layouts 4 --mesh fsdp=8

Every clip is encoded on K canvases, each with a choice of caption, views and places of its own: what a canvas shows reaches
every latent frame of the causal encoder, so that none of it can be put together later. What is stopped goes on where it was.
Several machines share the work by `--part 0/8`, `--part 1/8`, ... into folders of their own, which training reads as one.
"""

import collections
import dataclasses
import hashlib
import itertools
import pathlib
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Array
from tqdm import tqdm

from magref_jax import checkpoint, pipeline
from magref_jax.checkpoint import Params
from magref_jax.command import check_local, check_local_fields, program
from magref_jax.conditioning.case import encode_cases
from magref_jax.config import ModelConfig, load_model_config
from magref_jax.data.clips import Choice, Example, FirstFrameTarget, example_arrays, make_example
from magref_jax.data.records import ClipRecord, EncodedCase, RecordSource, Source, claimed, open_records, write_records
from magref_jax.sharding import constrain_batch, make_mesh, on_mesh, shard_batch

SHARD_RECORDS = 128  # about; at 480p with 4 layouts, 4.5 GB
NUM_THREADS = 4  # for what happens on the host
STORED = np.float16  # of everything a case holds


def encode_batch(
    config: ModelConfig, params: Mapping[str, Params], arrays: Mapping[str, Array], *, mesh: Mesh | None = None
) -> dict[str, Array]:
    """The frozen encoders on a batch of pixels: the fields of `Conditioning` that the model has, and `clean_latents`."""
    encoders = pipeline.encoders(config, dict(params))
    frames = jnp.asarray(arrays["frames"]).astype(jnp.float32) / 127.5 - 1
    with on_mesh(mesh):
        conditioning = encode_cases(encoders, dict(arrays), frames.shape[1])
        latents = jax.lax.stop_gradient(encoders.frames(frames))
    fields = {name: value for name, value in vars(conditioning).items() if value is not None}
    return constrain_batch(mesh, fields | {"clean_latents": latents})


_encode = jax.jit(encode_batch, static_argnums=0, static_argnames="mesh")


def precompute(
    source: Source,
    out: pathlib.Path,
    config: ModelConfig,
    tokenizer: Any,
    params: Mapping[str, Params],
    *,
    layouts: int,
    choice: Choice,
    first_frame_target: FirstFrameTarget,
    seed: int,
    batch_size: int = 8,
    mesh: Mesh | None = None,
    part: tuple[int, int] = (0, 1),
    num_threads: int = NUM_THREADS,
) -> RecordSource:
    """Writes the encoded records of a source to `out`; continues what is unfinished, opens what is complete.

    Case k of record i is a function of (seed, i, k). All processes of a run call it together, with `out` on a file system
    that they share; the first one writes.

    Args:
        source: Records with frames or a video.
        out: Folder for the encoded ones.
        config: The model whose encoders these are.
        tokenizer: Its tokenizer.
        params: The frozen networks, on the mesh: everything but the DiT.
        layouts: Cases of each record.
        choice: How a case is drawn.
        first_frame_target: See `make_example`.
        seed: Of all choices.
        batch_size: Clips that are encoded at once.
        mesh: Over which these are distributed.
        part: (k, n) encodes the k-th of n equal parts of the source.
        num_threads: For what happens on the host.

    Raises:
        ValueError: an argument, a record that cannot be encoded, or `out` holds records that were made differently.
    """
    _check(source, layouts=layouts, batch_size=batch_size, part=part, num_threads=num_threads)
    params = {name: tree for name, tree in params.items() if name != "dit"}
    first, stop = (len(source) * bound // part[1] for bound in (part[0], part[0] + 1))

    def draw(index: int) -> tuple[ClipRecord, list[Example]]:
        record = source[index]
        try:
            return record, [
                make_example(
                    config, tokenizer, record, np.random.default_rng([seed, index, layout]), choice, first_frame_target
                )
                for layout in range(layouts)
            ]
        except ValueError as error:
            raise ValueError(f"record {index}, {record.id!r}: {error}") from None

    def make(start: int) -> Iterator[ClipRecord]:
        start = _first_process_has(start)
        started.append(start)
        indices = range(first + start, stop)
        options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=max(num_threads, 2 * batch_size))
        drawn = iter(grain.MapDataset.source(indices).map(draw).to_iter_dataset(options))
        with tqdm(
            desc="encoding", unit="clip", initial=start, total=stop - first, disable=jax.process_index() > 0
        ) as bar:
            while block := list(itertools.islice(drawn, batch_size)):
                # Batches hold clips of one size; which clips these are does not depend on where the run began.
                shapes = [examples[0].frames.shape for _, examples in block]
                fields: list[list[dict[str, np.ndarray]]] = [[] for _ in block]
                for shape, layout in itertools.product(dict.fromkeys(shapes), range(layouts)):
                    rows = [row for row, own in enumerate(shapes) if own == shape]
                    padded = rows + rows[-1:] * (batch_size - len(rows))
                    examples = [example_arrays(block[row][1][layout]) for row in padded]
                    batch = {name: np.stack([example[name] for example in examples]) for name in examples[0]}
                    cells = batch.pop("subject_cells")
                    encoded = _on_host(_encode(config, params, shard_batch(mesh, batch), mesh=mesh))
                    encoded |= {"subject_cells": cells}
                    for position, row in enumerate(rows):
                        fields[row].append({name: values[position] for name, values in encoded.items()})
                for (record, examples), cases in zip(block, fields, strict=True):
                    bar.update()
                    yield _encoded_record(record, examples, cases)

    started: list[int] = []
    settings = {
        "source": source.fingerprint,
        "part": part,
        "encoders": _encoder_config(config),
        "weights": _weights_digest(params),
        "layouts": layouts,
        "choice": dataclasses.asdict(choice),
        "first_frame_target": first_frame_target,
        "seed": seed,
        "batch_size": batch_size,
    }
    if jax.process_index() == 0:
        write_records(
            out,
            make,
            stop - first,
            # Whole blocks, so that a run that goes on forms the same ones.
            shard_records=-(-SHARD_RECORDS // batch_size) * batch_size,
            shard_bytes=2**62,
            settings=settings,
        )
        if not started:  # nothing was left to do, which the others wait to hear
            _first_process_has(stop - first)
    else:
        collections.deque(make(0), maxlen=0)  # for what all processes compute together
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"{out} is written")
    return open_records(out)


def _check(source: Source, *, layouts: int, batch_size: int, part: tuple[int, int], num_threads: int) -> None:
    for name, value in (("layouts", layouts), ("batch_size", batch_size), ("num_threads", num_threads)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1.")
    if not 0 <= part[0] < part[1] <= len(source):
        raise ValueError(f"part={part[0]}/{part[1]} must be one of 0/N to N-1/N, with N at most {len(source)} records.")


def _first_process_has(value: int) -> int:
    return value if jax.process_count() == 1 else int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def _on_host(tree: Any) -> Any:
    """Whole arrays, in every process."""
    return jax.device_get(tree) if jax.process_count() == 1 else multihost_utils.process_allgather(tree, tiled=True)


def _encoded_record(
    record: ClipRecord, examples: Sequence[Example], fields: Sequence[Mapping[str, np.ndarray]]
) -> ClipRecord:
    captions, cases = list(record.captions), []
    for example, values in zip(examples, fields, strict=True):
        named: dict[str, Any] = {
            field.name: np.asarray(values[field.name], STORED) if field.name in values else None
            for field in dataclasses.fields(EncodedCase)
        }
        # Text embeddings are 0 at padding: what follows the text needs no room.
        length = int(example.case.attention_mask.sum())
        text = np.asarray(values["text_embeddings"][:length], STORED)
        captions[example.caption] = dataclasses.replace(captions[example.caption], embeddings=text)
        cases.append(EncodedCase(**(named | {"caption": example.caption})))
        for name, value in {**named, "text_embeddings": text}.items():
            if value is not None and name != "caption" and not np.isfinite(value).all():
                raise ValueError(f"record {record.id!r}: {name} is not finite as {np.dtype(STORED)}.")
    return dataclasses.replace(
        record, captions=tuple(captions), cases=tuple(cases), frames=None, video=None, latents=None
    )


def _encoder_config(config: ModelConfig) -> dict[str, Any]:
    """What the encoded fields depend on."""
    sampling, dit = config.sampling, config.dit
    return {
        "vae": dataclasses.asdict(config.vae),
        "text_encoder": dataclasses.asdict(config.text_encoder),
        "image_encoder": config.image_encoder and dataclasses.asdict(config.image_encoder),
        "takes_references": pipeline.takes_references(config),
        "num_frames": sampling.num_frames,
        "layout": sampling.layout,
        "mask_mode": sampling.mask_mode,
        "text_len": dit.text_len,
        "patch_size": dit.patch_size,
    }


def _weights_digest(params: Mapping[str, Params]) -> str:
    """Of the small parameters, which are quick to read: enough to notice that the networks are others."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree.leaves_with_path(dict(params)):
        if leaf.size <= 2**14:
            digest.update(jax.tree_util.keystr(path).encode() + np.ascontiguousarray(_on_host(leaf)).tobytes())
    return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class Arguments:
    """From records to encoded records."""

    records: tyro.conf.Positional[tuple[str, ...]]  # folders, or globs of folders
    model: pathlib.Path  # model folder
    out: pathlib.Path  # folder for the encoded records
    layouts: int = 4  # canvases of each clip
    mesh: str = "data=-1"  # see `sample.py --mesh`
    batch_size: int = 8  # clips at once
    first_frame_target: FirstFrameTarget = "canvas"
    choice: Choice = dataclasses.field(default_factory=Choice)
    part: str = "0/1"  # k/n: the k-th of n equal parts, counted from 0
    seed: int = 0


def main() -> None:
    arguments = tyro.cli(Arguments, description=__doc__)
    with program("data.precompute"):
        check_local_fields("records", arguments.records)
        check_local("--model", arguments.model)
        check_local("--out", arguments.out)
        if not (part := re.fullmatch(r"(\d{1,9})/(\d{1,9})", arguments.part)):
            raise ValueError(f"part={arguments.part!r} must be K/N, such as 0/8.")
        work: dict[str, Any] = {
            "layouts": arguments.layouts,
            "batch_size": arguments.batch_size,
            "part": (int(part[1]), int(part[2])),
            "num_threads": NUM_THREADS,
        }
        source = open_records(arguments.records)
        _check(source, **work)
        config = load_model_config(arguments.model)
        tokenizer = pipeline.load_tokenizer(arguments.model, config)
        mesh = make_mesh(arguments.mesh)
        with claimed("data.precompute", arguments.out):
            abstract = pipeline.place_params(mesh, pipeline.abstract_params(config))
            abstract.pop("dit")
            _, params = checkpoint.restore_model(arguments.model, abstract)
            began = time.monotonic()
            encoded = precompute(
                source,
                arguments.out,
                config,
                tokenizer,
                params,
                choice=arguments.choice,
                first_frame_target=arguments.first_frame_target,
                seed=arguments.seed,
                mesh=mesh,
                **work,
            )
    print(
        f"{len(encoded)} encoded records in {arguments.out}; {len(encoded) / (time.monotonic() - began):.2f} records/s, "
        f"{encoded.num_bytes / len(encoded) / 1e6:.3f} MB a clip"
    )


if __name__ == "__main__":
    main()
