"""The released sizes through the converter on a small machine. Sparse files: 80 GB of source need 1 GB of disk."""

import json
import pathlib
import random
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import convert_torch_weights
from magref_jax import checkpoint, pipeline
from magref_jax.config import ModelConfig
from magref_jax.convert.conversion import RULES
from magref_jax.convert.rules import torch_shapes
from tests.torch_folders import WAN_FILES

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(convert_torch_weights.__file__).parent
SAMPLE = 2**16  # bytes of each tensor that are not 0
MAX_RSS = 8e9  # bytes


def write_sparse(path: pathlib.Path, shapes: dict[str, tuple[int, ...]], dtype: str, rng: np.random.Generator) -> None:
    """A safetensors file with random values at the start of each tensor and holes behind them."""
    size = {"F32": 4, "BF16": 2}[dtype]
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + int(np.prod(shape)) * size
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
        for entry in header.values():
            start, end = entry["data_offsets"]
            values = rng.standard_normal(min(SAMPLE, end - start) // 4, np.float32).view(np.uint32)
            file.seek(8 + len(text) + start)
            file.write((values if dtype == "F32" else (values >> 16).astype(np.uint16)).tobytes())


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("full") / "source"
    folder.mkdir()
    rng = np.random.default_rng(0)
    config = ModelConfig()
    abstract = pipeline.abstract_params(config)
    for network, name in WAN_FILES.items():
        shapes = torch_shapes(RULES[network](getattr(config, network), "wan"), abstract[network])
        if network == "dit":
            names, weight_map = list(shapes), {}
            for number in range(7):
                file = f"{name}-{number + 1:05d}-of-00007.safetensors"
                part = {key: shapes[key] for key in names[number::7]}
                write_sparse(folder / file, part, "F32", rng)
                weight_map |= dict.fromkeys(part, file)
            (folder / f"{name}.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        else:
            dtype = "BF16" if network == "text_encoder" else "F32"
            write_sparse(folder / f"{name.removesuffix('.pth')}.safetensors", shapes, dtype, rng)
    return folder


def command(source: pathlib.Path, out: pathlib.Path, *flags: str) -> list[str]:
    return [
        sys.executable,
        str(ROOT / "convert_torch_weights.py"),
        str(source),
        str(out),
        "--dtype",
        "bfloat16",
        *flags,
    ]


def test_14b_converts_in_8_gb_and_survives_being_killed(source, tmp_path):
    size = sum(file.stat().st_size for file in source.iterdir())
    assert size > 79e9
    started = time.monotonic()
    subprocess.run(command(source, tmp_path / "whole"), cwd=tmp_path, check=True)
    seconds = time.monotonic() - started
    rss = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    print(f"\n{size / 1e9:.1f} GB in {seconds:.0f} s: {size / seconds / 1e9:.2f} GB/s, peak memory {rss / 1e9:.2f} GB")
    assert rss < MAX_RSS

    out, rng, flags = tmp_path / "model", random.Random(0), []
    for _ in range(3):
        running = subprocess.Popen(command(source, out, *flags), cwd=tmp_path)
        time.sleep(rng.uniform(0.15, 0.35) * seconds)
        running.send_signal(signal.SIGKILL)
        running.wait()
        assert not out.exists()
        flags = ["--resume"]
    started = time.monotonic()
    subprocess.run(command(source, out, *flags), cwd=tmp_path, check=True)
    print(f"killed 3 times, the last run took {time.monotonic() - started:.0f} s")
    # The manifests hold the digest of every file.
    assert (out / "MANIFEST.json").read_bytes() == (tmp_path / "whole" / "MANIFEST.json").read_bytes()
    checkpoint.verify_manifest(out)
