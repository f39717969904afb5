"""More than 200 damaged sources, from seeds: each ends in one message that names the cause, or in a warning.

A kind of damage is a function that spoils the copy of a good source and returns what the message must name.
"""

import collections
import dataclasses
import fractions
import functools
import hashlib
import json
import os
import pathlib
import random
import re
import shutil
import struct
import subprocess
import zipfile
import zlib
from collections.abc import Callable, Mapping
from typing import Any, Literal

import pytest
import safetensors.torch
import torch

import convert_torch_weights
from magref_jax import pipeline
from magref_jax.checkpoint import MANIFEST, verify_manifest
from magref_jax.convert.tensor_files import MAX_HEADER
from tests.torch_folders import HF_CONFIGS, WAN_CONFIG, Tensors, save_sharded, tensors

FILE, PTH, INDEX = "umt5_xxl.safetensors", "umt5.pth", "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
NO_DIGEST = "comes without a digest"


# What is damaged


def quantised() -> Tensors:
    """The matrices of the blocks in 8 bits, with the scales and the marker that such files have."""
    content: Tensors = {"scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn)}
    for name, tensor in tensors("text_encoder", "hf").items():
        if "block" in name and tensor.ndim == 2 and "relative" not in name:
            content[name] = (tensor * 100).to(torch.float8_e4m3fn)
            content[name.replace(".weight", ".scale_weight")] = torch.tensor(0.01)
        else:
            content[name] = tensor
    return content


def write_config(folder: pathlib.Path, network: str, layout: str = "hf") -> None:
    config = WAN_CONFIG if layout == "wan" else HF_CONFIGS[network]
    (folder / "config.json").write_text(json.dumps(config))


def write_file(folder: pathlib.Path) -> None:
    safetensors.torch.save_file(tensors("text_encoder", "hf"), folder / FILE, {"format": "pt"})


def write_pth(folder: pathlib.Path) -> None:
    torch.save(tensors("text_encoder", "wan"), folder / PTH)


def write_float8(folder: pathlib.Path) -> None:
    safetensors.torch.save_file(quantised(), folder / FILE)


def write_shards(folder: pathlib.Path) -> None:
    save_sharded(folder / "model", tensors("text_encoder", "hf"))
    write_config(folder, "text_encoder")


def write_dit(folder: pathlib.Path) -> None:
    save_sharded(folder / "model", tensors("dit", "wan"))
    write_config(folder, "dit", "wan")


def write_single(network: str, folder: pathlib.Path) -> None:
    safetensors.torch.save_file(tensors(network, "hf"), folder / FILE)
    write_config(folder, network)


BASES: dict[str, Callable[[pathlib.Path], None]] = {
    "file": write_file,
    "pth": write_pth,
    "float8": write_float8,
    "shards": write_shards,
    "dit": write_dit,
    "vae": functools.partial(write_single, "vae"),
    "image_encoder": functools.partial(write_single, "image_encoder"),
}

# How


Outcome = Literal["error", "warning", "error or no effect"]
Damage = Callable[[pathlib.Path, random.Random, int], str]


@dataclasses.dataclass(frozen=True)
class Kind:
    damage: Damage  # in the folder of the source, by a random number generator and the number of the instance
    base: str
    count: int
    says: str  # a pattern of the message or warning
    outcome: Outcome
    options: tuple[str, ...]


KINDS: dict[str, Kind] = {}


def kind(
    base: str, count: int, says: str, outcome: Outcome = "error", options: tuple[str, ...] = (), name: str = ""
) -> Callable[[Damage], Damage]:
    def add(damage: Damage) -> Damage:
        KINDS[name or damage.__name__] = Kind(damage, base, count, says, outcome, options)
        return damage

    return add


def flip(file: pathlib.Path, rng: random.Random, start: int = 0, end: int | None = None) -> None:
    content = bytearray(file.read_bytes())
    content[rng.randrange(start, len(content) if end is None else end)] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def header_end(file: pathlib.Path) -> int:
    return 8 + int.from_bytes(file.read_bytes()[:8], "little")


def edit_header(file: pathlib.Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    """Puts what `edit` returns, bytes or something to write as JSON, in the place of the header; the data stays."""
    content, end = file.read_bytes(), header_end(file)
    header = edit(json.loads(content[8:end]))
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + content[end:])


def edit_tensors(file: pathlib.Path, edit: Callable[[Tensors], Any]) -> None:
    if file.suffix == ".pth":
        content = torch.load(file, weights_only=True)
        edit(content)
        torch.save(content, file)
    else:
        content = safetensors.torch.load(file.read_bytes())  # bytes: a mapped file cannot be written over
        edit(content)
        safetensors.torch.save_file(content, file)


def edit_json(file: pathlib.Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content))


def pack_anew(
    file: pathlib.Path,
    edit: Callable[[str, bytes], bytes | None] = lambda name, content: content,
    compression: int = zipfile.ZIP_STORED,
) -> None:
    """Another archive of the same records, with checksums that are right; None leaves a record out."""
    with zipfile.ZipFile(file) as archive:
        records = {record.filename: archive.read(record) for record in archive.infolist()}
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in records.items():
            if (edited := edit(name, content)) is not None:
                archive.writestr(name, edited)


def record_span(file: pathlib.Path, record: zipfile.ZipInfo) -> tuple[int, int]:
    """Where the content of a record begins and ends."""
    lengths = struct.unpack_from("<2H", file.read_bytes(), record.header_offset + 26)
    start = record.header_offset + 30 + sum(lengths)
    return start, start + record.file_size


def edit_record(file: pathlib.Path, ending: str, edit: Callable[[bytes], bytes]) -> None:
    """Puts content of the same length or less in the place of a record's, and its checksum and size into the directory."""
    with zipfile.ZipFile(file) as archive:
        record = next(record for record in archive.infolist() if record.filename.endswith(ending))
    start, end = record_span(file, record)
    archived = bytearray(file.read_bytes())
    content = edit(bytes(archived[start:end]))
    archived[start : start + len(content)] = content
    entry = archived.index(record.filename.encode(), archived.index(b"PK\x01\x02")) - 46
    struct.pack_into("<3I", archived, entry + 16, zlib.crc32(content), len(content), len(content))
    file.write_bytes(archived)


def some_weight(content: Mapping[str, Any], rng: random.Random) -> str:
    """A matrix, though not one that tells what its file is or how large the network."""
    names = re.compile(r".*\.(SelfAttention\.[kvo]|attn\.[kvo]|wi_0|wo|ffn\.fc2)\.weight")
    return rng.choice(sorted(filter(names.fullmatch, content)))


# Files of safetensors


@kind("file", 12, "cut off")
def cut_off(folder, rng, number):
    content = (folder / FILE).read_bytes()
    (folder / FILE).write_bytes(content[: rng.randrange(len(content))])
    return FILE


@kind("file", 2, "bytes that belong to no tensor")
def bytes_appended(folder, rng, number):
    with (folder / FILE).open("ab") as file:
        file.write(rng.randbytes(rng.randrange(1, 100)))
    return FILE


@kind("file", 20, "", "error or no effect")
def header_bit_flipped(folder, rng, number):
    flip(folder / FILE, rng, 8, header_end(folder / FILE))
    return FILE


@kind("file", 5, "no safetensors file, or it is cut off|header of")
def length_bit_flipped(folder, rng, number):
    flip(folder / FILE, rng, 0, 8)
    return FILE


@kind("file", 3, "header claims")
def huge_header(folder, rng, number):
    content = (folder / FILE).read_bytes()
    length = (MAX_HEADER + 1, 2**40, 2**64 - 1)[number]
    (folder / FILE).write_bytes(length.to_bytes(8, "little") + content[8:])
    return FILE


def change(header: dict[str, Any], name: str, **fields: Any) -> dict[str, Any]:
    return header | {name: header[name] | fields}


def shift(header: dict[str, Any], name: str, *by: int) -> dict[str, Any]:
    offsets = [offset + step for offset, step in zip(header[name]["data_offsets"], by, strict=True)]
    return change(header, name, data_offsets=offsets)


# What becomes of the header, given it and the name of one of its tensors; and what the message says.
HEADERS: dict[str, tuple[str, list[Callable[[dict[str, Any], str], Any]]]] = {
    "header_no_json": ("damaged", [lambda h, n: b"no JSON at all", lambda h, n: b"{'a': 1}", lambda h, n: b"{}x"]),
    "header_no_utf8": ("damaged", [lambda h, n: b'{"\xff\xfe": {}}', lambda h, n: json.dumps(h).encode("utf-16")]),
    "header_no_object": ("no JSON object", [lambda h, n: [h], lambda h, n: 55, lambda h, n: None, lambda h, n: "text"]),
    "header_deep": ("recursion", [lambda h, n: b'{"a":' * 100_000, lambda h, n: b'{"a":' + b"[" * 100_000]),
    "name_twice": (
        "a name occurs twice",
        [
            lambda h, n: json.dumps(h)[:-1].encode() + f", {json.dumps(n)}: {json.dumps(h[n])}}}".encode(),
            lambda h, n: b'{"a": {"dtype": "F32", "dtype": "F16", "shape": [], "data_offsets": [0, 2]}}',
        ],
    ),
    "number_endless": ("damaged", [lambda h, n: b'{"a": ' + b"9" * 5000 + b"}"]),
    "offsets_negative": ("data_offsets", [lambda h, n: change(h, n, data_offsets=[-8, -4])]),
    "offsets_reversed": ("bytes, expected", [lambda h, n: change(h, n, data_offsets=h[n]["data_offsets"][::-1])]),
    "offsets_beyond": ("begins at byte", [lambda h, n: shift(h, n, 2**40, 2**40)]),
    "offsets_apart": ("begins at byte", [lambda h, n: shift(h, n, 4, 4)]),
    "offsets_overlap": (
        "begins at byte",
        [lambda h, n: change(h, n.replace(".q.", ".k."), data_offsets=h[n.replace(".k.", ".q.")]["data_offsets"])],
    ),
    "offsets_no_pair": (
        "data_offsets",
        [lambda h, n: change(h, n, data_offsets=[0]), lambda h, n: change(h, n, data_offsets="0, 4")],
    ),
    "dtype_unknown": (
        "has dtype",
        [
            lambda h, n: change(h, n, dtype="F4"),
            lambda h, n: change(h, n, dtype="f32"),
            lambda h, n: change(h, n, dtype=["F32"]),
            lambda h, n: change(h, n, dtype=None),
        ],
    ),
    "shape_no_counts": (
        "has shape",
        [
            lambda h, n: change(h, n, shape=[-1, -480]),
            lambda h, n: change(h, n, shape=[24.0, 20]),
            lambda h, n: change(h, n, shape=[True, 480]),
            lambda h, n: change(h, n, shape={"0": 480}),
            lambda h, n: change(h, n, shape=None),
        ],
    ),
    "shape_of_other_size": (
        "bytes, expected",
        [
            lambda h, n: change(h, n, shape=[25, 20]),
            lambda h, n: change(h, n, shape=[10**18, 10**18]),
            lambda h, n: change(h, n, dtype="F64"),
            lambda h, n: shift(h, n, 0, -4),
        ],
    ),
    "entry_incomplete": (
        "is not dtype, shape and data_offsets",
        [
            lambda h, n: h | {n: {"dtype": "F32", "shape": []}},
            lambda h, n: h | {n: []},
            lambda h, n: change(h, n, crc=0),
        ],
    ),
    "metadata_no_texts": (
        "__metadata__",
        [lambda h, n: h | {"__metadata__": {"a": 1}}, lambda h, n: h | {"__metadata__": []}],
    ),
}


def damage_header(edits: list[Callable[[dict[str, Any], str], Any]], folder, rng, number):
    name = rng.choice(
        [f"encoder.block.{layer}.layer.0.SelfAttention.{letter}.weight" for layer in (0, 1) for letter in "qk"]
    )
    edit_header(folder / FILE, lambda header: edits[number](header, name))
    return FILE


for label, (text, edits) in HEADERS.items():
    kind("file", len(edits), text, name=label)(functools.partial(damage_header, edits))


# Names, shapes and values


@kind("file", 6, "matches 0 conversion rules")
def name_changed(folder, rng, number):
    new = ""

    def edit(content: Tensors) -> None:
        nonlocal new
        old = some_weight(content, rng)
        new = old + "_" if number % 2 else "x" + old
        content[new] = content.pop(old)

    edit_tensors(folder / FILE, edit)
    return new


@kind("pth", 4, "is missing")
def tensor_missing(folder, rng, number):
    names: list[str] = []

    def edit(content: Tensors) -> None:
        names.append(some_weight(content, rng))
        del content[names[0]]

    edit_tensors(folder / PTH, edit)
    return names[0]


@kind("file", 2, "matches 0 conversion rules")
def tensor_too_many(folder, rng, number):
    name = ("encoder.block.1.layer.1.extra.weight", "decoder.block.0.layer.0.SelfAttention.q.weight")[number]
    edit_tensors(folder / FILE, lambda content: content.update({name: torch.ones(3)}))
    return name


@kind("pth", 2, "'blocks.1.* is missing")
def layer_number_changed(folder, rng, number):
    def edit(content: Tensors) -> None:
        for name in [name for name in content if name.startswith("blocks.1.")]:
            content[name.replace("blocks.1.", f"blocks.{number * 37 + 2}.")] = content.pop(name)

    edit_tensors(folder / PTH, edit)
    return PTH


@kind("file", 6, "has shape .* expected")
def shape_changed(folder, rng, number):
    names: list[str] = []

    def edit(content: Tensors) -> None:
        name = rng.choice(sorted(name for name in content if "DenseReluDense.wo" in name or ".o." in name))
        names.append(name)
        shapes = (content[name].T.shape, (content[name].numel(),), (1, *content[name].shape))
        content[name] = content[name].reshape(shapes[number % 3]).contiguous()

    edit_tensors(folder / FILE, edit)
    return names[0]


@kind("image_encoder", 3, "are no class token and a square of patches")
def positions_of_no_square(folder, rng, number):
    name = "embeddings.position_embedding.weight"
    shape = ((7, 160), (5,), ())[number]
    edit_tensors(folder / FILE, lambda content: content.update({name: torch.ones(shape)}))
    return FILE


@kind("vae", 2, "expected 5 dimensions")
def convolution_without_axes(folder, rng, number):
    name = ("encoder.down_blocks.0.conv1.weight", "encoder.conv_in.weight")[number]
    edit_tensors(folder / FILE, lambda content: content.update({name: torch.tensor(1.0)}))
    return name


@kind("file", 1, "has shape .* they are one")
def tied_embeddings_differ(folder, rng, number):
    edit_tensors(folder / FILE, lambda content: content.update({"encoder.embed_tokens.weight": torch.ones(65, 20)}))
    return "encoder.embed_tokens.weight"


@kind("file", 2, "both with and without the prefix")
def prefix_on_some(folder, rng, number):
    def edit(content: Tensors) -> None:
        old = dict(content)
        content.clear()
        content.update({f"model.{name}": tensor for name, tensor in old.items()})
        content["shared.weight"] = old["shared.weight"].clone()

    edit_tensors(folder / FILE, edit)
    return FILE


@kind("file", 5, "weights are floats")
def weights_of_whole_numbers(folder, rng, number):
    dtype = (torch.int8, torch.uint8, torch.bool, torch.int32, torch.int64)[number]
    names: list[str] = []

    def edit(content: Tensors) -> None:
        names.append(some_weight(content, rng))
        content[names[0]] = content[names[0]].to(dtype)

    edit_tensors(folder / FILE, edit)
    return names[0]


def spoil_value(file: pathlib.Path, rng: random.Random, value: float) -> str:
    names: list[str] = []

    def edit(content: Tensors) -> None:
        names.append(some_weight(content, rng))
        content[names[0]].view(-1)[rng.randrange(content[names[0]].numel())] = value

    edit_tensors(file, edit)
    return names[0]


VALUES = (float("nan"), float("inf"), float("-inf"))


@kind("file", 3, "has values that are infinite or no numbers", "warning")
def no_numbers(folder, rng, number):
    return spoil_value(folder / FILE, rng, VALUES[number])


@kind("pth", 3, "has values that are infinite or no numbers", "warning")
def no_numbers_in_pth(folder, rng, number):
    return spoil_value(folder / PTH, rng, VALUES[number])


@kind("float8", 2, "has values that are infinite or no numbers", "warning")
def no_numbers_in_scale(folder, rng, number):
    name = "encoder.block.1.layer.0.SelfAttention.v"
    value = torch.tensor(VALUES[number])
    edit_tensors(folder / FILE, lambda content: content.update({f"{name}.scale_weight": value}))
    return f"{name}.weight"


@kind("file", 8, NO_DIGEST, "warning")
def data_bit_flipped(folder, rng, number):
    flip(folder / FILE, rng, header_end(folder / FILE))
    return FILE


@kind("file", 8, "is damaged: its sha256 is")
def data_bit_flipped_with_digest(folder, rng, number):
    file = folder / FILE
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    flip(file, rng, header_end(file))
    if number % 2:  # as the cache of the hub keeps files
        (folder / ".blobs").mkdir()
        file.rename(folder / ".blobs" / digest)
        file.symlink_to(folder / ".blobs" / digest)
    else:  # as a download into a folder leaves them
        note = folder / ".cache" / "huggingface" / "download" / f"{FILE}.metadata"
        note.parent.mkdir(parents=True)
        note.write_text(f"{'0' * 40}\n{digest}\n1700000000.0\n")
    return FILE


# 8-bit floats


SCALE = "encoder.block.0.layer.0.SelfAttention.o.scale_weight"
WEIGHT = SCALE.replace("scale_weight", "weight")


def quant(text: str) -> torch.Tensor:
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def rename(content: Tensors, old: str, new: str) -> None:
    content[new] = content.pop(old)


QUANTISED: dict[str, tuple[str, str, list[Callable[[Tensors], Any]]]] = {
    "scale_alone": (
        "which is missing",
        SCALE,
        [lambda content: content.pop(WEIGHT), lambda content: rename(content, WEIGHT, WEIGHT + "s")],
    ),
    "scale_of_wrong_shape": (
        "does not scale",
        SCALE,
        [
            lambda content: content.update({SCALE: torch.ones(7)}),
            lambda content: content.update({SCALE: torch.ones(7, 1)}),
            lambda content: content.update({SCALE: torch.ones(20, 5, 1)}),
            lambda content: content.update({SCALE: torch.ones(20, 0, 1)}),
            lambda content: content.update({SCALE: torch.ones(0)}),
        ],
    ),
    "scale_twice": (
        "both scale",
        WEIGHT,
        [lambda content: content.update({SCALE.replace("scale_weight", "weight_scale"): torch.tensor(2.0)})],
    ),
    "scale_of_whole_numbers": (
        "only 8-bit floats",
        WEIGHT,
        [
            lambda content: content.update({WEIGHT: torch.ones(20, 24, dtype=torch.int8)}),
            lambda content: content.update({WEIGHT: torch.ones(20, 24, dtype=torch.uint8)}),
        ],
    ),
    "format_unknown": (
        "known are float8",
        WEIGHT.replace("weight", "comfy_quant"),
        [
            lambda content: content.update({WEIGHT.replace("weight", "comfy_quant"): quant('{"format": "nvfp4"}')}),
            lambda content: content.update({WEIGHT.replace("weight", "comfy_quant"): quant('{"format": ["a"]}')}),
        ],
    ),
    "format_damaged": (
        "is damaged",
        WEIGHT.replace("weight", "comfy_quant"),
        [
            lambda content: content.update({WEIGHT.replace("weight", "comfy_quant"): quant("nvfp4")}),
            lambda content: content.update({WEIGHT.replace("weight", "comfy_quant"): quant("[1]")}),
            lambda content: content.update({WEIGHT.replace("weight", "comfy_quant"): quant("{}")}),
            lambda content: content.update({WEIGHT.replace("weight", "comfy_quant"): quant("[" * 100_000)}),
            lambda content: content.update({WEIGHT.replace("weight", "comfy_quant"): torch.ones(0)}),
        ],
    ),
}


def damage_quantised(edits: list[Callable[[Tensors], Any]], named: str, folder, rng, number):
    edit_tensors(folder / FILE, edits[number])
    return named


for label, (text, named, edits) in QUANTISED.items():
    kind("float8", len(edits), text, name=label)(functools.partial(damage_quantised, edits, named))


# Several files and an index


@kind("shards", 2, "names .* which is missing")
def shard_missing(folder, rng, number):
    (folder / SHARDS[number]).unlink()
    return SHARDS[number]


@kind("shards", 2, "is missing or does not name it")
def shard_not_in_index(folder, rng, number):
    def edit(index: dict[str, Any]) -> None:
        index["weight_map"] = {name: file for name, file in index["weight_map"].items() if file != SHARDS[number]}

    edit_json(folder / INDEX, edit)
    return SHARDS[number]


@kind("shards", 1, "is missing or does not name it")
def index_missing(folder, rng, number):
    (folder / INDEX).unlink()
    return INDEX


@kind("shards", 4, "names files outside its folder")
def index_leads_outside(folder, rng, number):
    shutil.copy(folder / SHARDS[1], folder.parent / "other.safetensors")
    target = ("../other.safetensors", str(folder.parent / "other.safetensors"), "a/../b.safetensors", "/etc/passwd")

    def edit(index: dict[str, Any]) -> None:
        index["weight_map"][rng.choice(sorted(index["weight_map"]))] = target[number]

    edit_json(folder / INDEX, edit)
    return INDEX


@kind("shards", 7, "is damaged")
def index_damaged(folder, rng, number):
    texts = ("", "{", "[]", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": 1}}', "[" * 100_000)
    (folder / INDEX).write_text(texts[number])
    return INDEX


@kind("shards", 3, "says that .* it is not")
def index_says_other_shard(folder, rng, number):
    name = ""

    def edit(index: dict[str, Any]) -> None:
        nonlocal name
        name = rng.choice(sorted(index["weight_map"]))
        index["weight_map"][name] = SHARDS[index["weight_map"][name] == SHARDS[0]]

    edit_json(folder / INDEX, edit)
    return name


@kind("shards", 1, "says that .* it is not")
def index_says_too_much(folder, rng, number):
    edit_json(folder / INDEX, lambda index: index["weight_map"].update({"encoder.extra": SHARDS[0]}))
    return "encoder.extra"


@kind("shards", 2, "does not name")
def index_says_too_little(folder, rng, number):
    names: list[str] = []

    def edit(index: dict[str, Any]) -> None:
        names.append(rng.choice(sorted(index["weight_map"])))
        del index["weight_map"][names[0]]

    edit_json(folder / INDEX, edit)
    return names[0]


@kind("shards", 1, "says that .* it is not")
def shards_swapped(folder, rng, number):
    (folder / SHARDS[0]).rename(folder / "spare")
    (folder / SHARDS[1]).rename(folder / SHARDS[0])
    (folder / "spare").rename(folder / SHARDS[1])
    return INDEX


@kind("shards", 2, "is in .* and in")
def tensor_in_both_shards(folder, rng, number):
    names: list[str] = []

    def edit(content: Tensors) -> None:
        other = safetensors.torch.load((folder / SHARDS[1 - number]).read_bytes())
        names.append(rng.choice(sorted(other)))
        content[names[0]] = other[names[0]]

    edit_tensors(folder / SHARDS[number], edit)
    return names[0]


@kind("dit", 4, "cut off")
def shard_cut_off(folder, rng, number):
    file = folder / SHARDS[number % 2]
    file.write_bytes(file.read_bytes()[: rng.randrange(file.stat().st_size)])
    return file.name


# config.json


@kind("shards", 3, "is damaged")
def config_no_json(folder, rng, number):
    (folder / "config.json").write_text(('{"architectures": ["UMT5', "[]", "[" * 100_000)[number])
    return "config.json"


# By network: what config.json says, against the tensors or against reason.
DISAGREEMENTS = {
    "shards": [{"d_model": 21}, {"num_heads": 4}, {"num_layers": 3}, {"d_kv": "8"}],
    "dit": [{"dim": 48}, {"in_dim": 16}, {"patch_size": [1, 1, 2]}],
    "vae": [{"z_dim": 48}, {"dim_mult": [1, 2]}, {"temperal_downsample": [True, True]}],
    "image_encoder": [{"hidden_size": 1280}, {"image_size": 224}],
}
UNREASONABLE = {
    "shards": [{"relative_attention_max_distance": "far"}, {"layer_norm_epsilon": -1e-6}],
    "dit": [{"num_heads": "2"}, {"num_heads": 2.0}, {"text_len": -16}, {"eps": float("nan")}],
    "vae": [{"latents_mean": 3, "latents_std": 1}, {"latents_mean": ["0"] * 16, "latents_std": [1.0] * 16}],
    "image_encoder": [{"num_attention_heads": True}, {"layer_norm_eps": {}}, {"vision_config": "as usual"}],
}


def damage_config(fields: list[dict[str, Any]], folder, rng, number):
    edit_json(folder / "config.json", lambda config: config.update(fields[number]))
    return "config.json"


for base, fields in DISAGREEMENTS.items():
    kind(base, len(fields), "says .* but the tensors have", name=f"config_disagrees_{base}")(
        functools.partial(damage_config, fields)
    )
for base, fields in UNREASONABLE.items():
    kind(base, len(fields), "says .* expected|is damaged", name=f"config_unreasonable_{base}")(
        functools.partial(damage_config, fields)
    )


@kind("dit", 2, "does not split into")
def heads_do_not_divide(folder, rng, number):
    edit_json(folder / "config.json", lambda config: config.update(num_heads=(5, 24)[number]))
    return "num_heads"


@kind("vae", 1, "need latent_channels=16 entries")
def statistics_too_short(folder, rng, number):
    edit_json(folder / "config.json", lambda config: config.update(latents_mean=[0.0], latents_std=[1.0]))
    return "latent_mean"


# torch's archives and what is pickled in them


@kind("pth", 10, "cut off")
def pth_cut_off(folder, rng, number):
    content = (folder / PTH).read_bytes()
    (folder / PTH).write_bytes(content[: rng.randrange(len(content))])
    return PTH


@kind("pth", 15, "checksum|Bad CRC")
def record_bit_flipped(folder, rng, number):
    file = folder / PTH
    with zipfile.ZipFile(file) as archive:
        record = rng.choice([record for record in archive.infolist() if record.file_size])
    flip(file, rng, *record_span(file, record))
    return PTH


@kind("pth", 15, "", "error or no effect")
def pth_bit_flipped(folder, rng, number):
    flip(folder / PTH, rng)
    return PTH


@kind("pth", 6, "", "error or no effect")
def pth_directory_bit_flipped(folder, rng, number):
    flip(folder / PTH, rng, (folder / PTH).read_bytes().index(b"PK\x01\x02"))
    return PTH


class Command:
    """Is pickled as a call."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


@kind("pth", 7, "something other than tensors")
def pickle_that_runs(folder, rng, number):
    marker = folder.parent / "ran"
    touch = f"open({str(marker)!r}, 'w').close()"
    command = (
        Command(os.system, f"touch {marker}"),
        Command(eval, touch),
        Command(exec, touch),
        Command(subprocess.check_call, ["touch", str(marker)]),
        Command(pathlib.Path.touch, marker),
        Command(shutil.copy, str(folder / PTH), str(marker)),
        fractions.Fraction(1, 3),
    )[number]
    content = torch.load(folder / PTH, weights_only=True)
    torch.save({**content, "norm.weight": command}, folder / PTH)
    return PTH


@kind("pth", 6, "expected a tensor")
def entry_no_tensor(folder, rng, number):
    value = (3, None, [torch.ones(2)], "text", collections.OrderedDict(), torch.Size([3]))[number]
    edit_tensors(folder / PTH, lambda content: content.update(step=value))
    return "step"


@kind("pth", 4, "expected a plain tensor")
def tensor_not_plain(folder, rng, number):
    value = torch.ones(2, 2)
    values = (value.to_sparse(), torch._neg_view(value), value.to("meta"), value.to(torch.complex64).conj().imag)
    edit_tensors(folder / PTH, lambda content: content.update(extra=values[number]))
    return "extra"


@kind("pth", 1, "expected the name of a tensor")
def name_no_text(folder, rng, number):
    edit_tensors(folder / PTH, lambda content: content.update({3: torch.ones(2)}))
    return PTH


@kind("pth", 1, "has dtype torch.complex64")
def weights_of_complex_numbers(folder, rng, number):
    edit_tensors(folder / PTH, lambda content: content.update({"norm.weight": torch.ones(20, dtype=torch.complex64)}))
    return "norm.weight"


@kind("pth", 4, "expected tensors by name")
def content_no_names(folder, rng, number):
    torch.save(([torch.ones(2)], {}, None, {"state_dict": {}})[number], folder / PTH)
    return PTH


@kind("pth", 1, "no checkpoint that torch.save wrote as a zip archive")
def pth_legacy(folder, rng, number):
    content = torch.load(folder / PTH, weights_only=True)
    torch.save(content, folder / PTH, _use_new_zipfile_serialization=False)
    return PTH


@kind("pth", 2, "is compressed")
def pth_compressed(folder, rng, number):
    pack_anew(folder / PTH, compression=(zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA)[number])
    return PTH


@kind("pth", 1, "its byte order is")
def pth_big_endian(folder, rng, number):
    pack_anew(folder / PTH, lambda name, content: b"big" if name.endswith("/byteorder") else content)
    return PTH


@kind("pth", 3, "but its record has")
def record_too_short(folder, rng, number):
    edit_record(folder / PTH, f"/data/{number}", lambda content: content[:-4])
    return PTH


@kind("pth", 1, "is not where torch.save puts it")
def pth_packed_anew(folder, rng, number):
    pack_anew(folder / PTH)
    return PTH


@kind("pth", 2, "is not where torch.save puts it|was not loaded")
def record_missing(folder, rng, number):
    ending = ("/data/1", "/data.pkl")[number]
    pack_anew(folder / PTH, lambda name, content: None if name.endswith(ending) else content)
    return PTH


@kind("pth", 2, "but its record has")
def view_beyond_record(folder, rng, number):
    # The shape or the place of the first tensor, (64, 20) from 0, as its pickle says it.
    old, new = ((b"K@K\x14\x86", b"K\xffK\x14\x86"), (b"QK\x00K@", b"QK\x40K@"))[number]

    def edit(content: bytes) -> bytes:
        assert old in content
        return content.replace(old, new, 1)

    edit_record(folder / PTH, "/data.pkl", edit)
    return PTH


# With a checksum that is right: no bit that happens to say another shape or place inside the same record is among these.
@kind("pth", 8, "", "error or no effect")
def pickle_bit_flipped(folder, rng, number):
    def edit(content: bytes) -> bytes:
        place = rng.randrange(len(content))
        return content[:place] + bytes([content[place] ^ (1 << rng.randrange(8))]) + content[place + 1 :]

    edit_record(folder / PTH, "/data.pkl", edit)
    return ""


# Whole sources


@kind("file", 2, "0 bytes|no checkpoint")
def file_empty(folder, rng, number):
    (folder / FILE).unlink()
    name = (FILE, PTH)[number]
    (folder / name).write_bytes(b"")
    return name


@kind("file", 3, "no safetensors file|header of|no checkpoint")
def file_of_noise(folder, rng, number):
    (folder / FILE).unlink()
    name = (FILE, PTH, FILE)[number]
    (folder / name).write_bytes(rng.randbytes(5000) if number < 2 else bytes(5000))
    return name


@kind("file", 1, "no checkpoint")
def safetensors_named_pth(folder, rng, number):
    (folder / FILE).rename(folder / PTH)
    return PTH


@kind("pth", 1, "no safetensors file")
def pth_named_safetensors(folder, rng, number):
    (folder / PTH).rename(folder / FILE)
    return FILE


@kind("file", 2, "holds no weights; expected safetensors")
def nothing_there(folder, rng, number):
    (folder / FILE).unlink()
    if number:
        (folder / "README.md").write_text("Weights follow soon.")
    return "source"


@kind("file", 1, "does not exist")
def no_folder(folder, rng, number):
    shutil.rmtree(folder)
    return "source"


@kind("file", 1, "not in SOURCE", options=("--only", "vae"))
def network_not_there(folder, rng, number):
    return "vae"


@kind("file", 3, "holds text_encoder twice")
def network_twice(folder, rng, number):
    if number == 0:
        shutil.copy(folder / FILE, folder / "copy.safetensors")
    elif number == 1:
        write_pth(folder)
    else:
        (folder / "text_encoder").mkdir()
        write_shards(folder / "text_encoder")
    return FILE


@kind("file", 3, "it is a LoRA")
def lora(folder, rng, number):
    down, up = (("lora_A", "lora_B"), ("lora_down", "lora_up"), ("lora_A.default", "lora_B.default"))[number]
    name = f"diffusion_model.blocks.{rng.randrange(40)}.self_attn.q"
    content = {f"{name}.{down}.weight": torch.ones(2, 24), f"{name}.{up}.weight": torch.ones(24, 2)}
    safetensors.torch.save_file(content, folder / FILE)
    return FILE


@kind("file", 2, "holds no network that is known here")
def network_unknown(folder, rng, number):
    content = ({"unet.conv_in.weight": torch.ones(3)}, {})[number]
    safetensors.torch.save_file(content, folder / FILE)
    return FILE


# What must come of it

CASES = [(name, number) for name, each in KINDS.items() for number in range(each.count)]


@pytest.fixture(scope="module", autouse=True)
def _shapes_once():
    """Tracing the models for their shapes would take most of the time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "abstract_params", functools.cache(pipeline.abstract_params))
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], pathlib.Path]:
    @functools.cache
    def write(name: str) -> pathlib.Path:
        folder = tmp_path_factory.mktemp(name)
        BASES[name](folder)
        return folder

    return write


@pytest.fixture(scope="module")
def clean_manifest(base, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """What the conversion of an undamaged source writes."""

    @functools.cache
    def convert(name: str) -> str:
        out = tmp_path_factory.mktemp("clean") / "model"
        convert_torch_weights.main([str(base(name)), str(out)])
        return (out / MANIFEST).read_text()

    return convert


def test_there_are_two_hundred():
    assert len(CASES) >= 200


@pytest.mark.parametrize("name", BASES)
def test_undamaged_source_is_converted(name, clean_manifest, capsys):
    assert json.loads(clean_manifest(name))
    printed = capsys.readouterr().out
    assert "no numbers" not in printed
    assert (NO_DIGEST in printed) == (name != "pth")


def test_undamaged_source_with_digest_gives_no_warning(base, tmp_path, capsys):
    source = shutil.copytree(base("file"), tmp_path / "source")
    note = source / ".cache" / "huggingface" / "download" / f"{FILE}.metadata"
    note.parent.mkdir(parents=True)
    note.write_text(f"{'0' * 40}\n{hashlib.sha256((source / FILE).read_bytes()).hexdigest()}\n1700000000.0\n")
    convert_torch_weights.main([str(source), str(tmp_path / "model")])
    assert "warning" not in capsys.readouterr().out


@pytest.mark.parametrize(("name", "number"), CASES, ids=[f"{name}-{number}" for name, number in CASES])
def test_damage(name, number, base, clean_manifest, tmp_path, capsys):
    case = KINDS[name]
    clean = clean_manifest(case.base)
    source = shutil.copytree(base(case.base), tmp_path / "source")
    named = case.damage(source, random.Random(f"{name} {number}"), number)
    target = tmp_path / "target"
    target.mkdir()
    capsys.readouterr()
    try:
        convert_torch_weights.main([str(source), str(target / "model"), *case.options])
        status = 0
    except SystemExit as stop:
        status = stop.code
    printed = capsys.readouterr()

    assert not (tmp_path / "ran").exists()
    if case.outcome == "error" or (case.outcome == "error or no effect" and status):
        assert status == 2
        # Without the path, which has the name of the test in it.
        _, begin, message = printed.err.replace(str(tmp_path), "").partition("convert_torch_weights.py: ")
        assert begin
        assert "Traceback" not in printed.err
        assert len(message) < 2000
        assert named in message
        assert re.search(case.says, message)
        # What is found before writing leaves nothing to clear away before the next attempt.
        assert list(target.iterdir()) == []
        return
    assert status == 0
    assert [child.name for child in target.iterdir()] == ["model"]
    verify_manifest(target / "model")
    written = (target / "model" / MANIFEST).read_text()
    if case.outcome == "warning":
        warnings = [line for line in printed.out.splitlines() if line.startswith("warning: ")]
        assert any(named in line and re.search(case.says, line) for line in warnings)
        assert written != clean
    else:
        assert written == clean
