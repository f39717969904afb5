"""Files of tensors, against the libraries that define them: safetensors and torch. Damage is in test_damage.py."""

import ast
import json
import os
import pathlib
import re
import sys
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from magref_jax.convert.sources import ScaledTensor, dequantised
from magref_jax.convert.tensor_files import (
    check_pth,
    read_pth,
    read_safetensors,
    safetensors_metadata,
    write_safetensors,
)

ROOT = pathlib.Path(__file__).parents[2]
TORCH_DTYPES = {
    torch.float64: np.float64,
    torch.float32: np.float32,
    torch.float16: np.float16,
    torch.bfloat16: ml_dtypes.bfloat16,
    torch.float8_e4m3fn: ml_dtypes.float8_e4m3fn,
    torch.float8_e5m2: ml_dtypes.float8_e5m2,
    torch.int64: np.int64,
    torch.int32: np.int32,
    torch.int16: np.int16,
    torch.int8: np.int8,
    torch.uint64: np.uint64,
    torch.uint32: np.uint32,
    torch.uint16: np.uint16,
    torch.uint8: np.uint8,
    torch.bool: np.bool_,
}
SHAPES = ((3, 5), (4,), (), (0,), (2, 0, 3), (1, 2, 3, 4, 5))


def content_of(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Every bit at random, so that a NaN, a sign of zero or a subnormal shows if it is lost."""
    rng = np.random.default_rng(seed)
    if dtype == torch.bool:
        return torch.tensor(rng.integers(0, 2, shape), dtype=torch.bool)
    numbers = rng.integers(0, 256, (*shape, dtype.itemsize), dtype=np.uint8)
    return torch.tensor(numbers.reshape(-1)).view(dtype).reshape(shape)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def everything() -> dict[str, torch.Tensor]:
    return {f"{dtype} {shape}": content_of(dtype, shape) for dtype in TORCH_DTYPES for shape in SHAPES}


def assert_read(read, expected: dict[str, torch.Tensor]) -> None:
    assert set(read) == set(expected)
    for name, tensor in expected.items():
        array = read[name].read()
        assert array.dtype == read[name].dtype == TORCH_DTYPES[tensor.dtype], name
        assert array.shape == read[name].shape == tuple(tensor.shape), name
        assert array.flags.c_contiguous, name
        assert array.tobytes() == bits(tensor), name


# safetensors


def test_reads_what_the_library_writes(tmp_path):
    expected = everything()
    safetensors.torch.save_file(expected, tmp_path / "all.safetensors", {"format": "pt"})
    assert_read(read_safetensors(tmp_path / "all.safetensors"), expected)
    assert safetensors_metadata(tmp_path / "all.safetensors") == {"format": "pt"}


def test_reads_what_the_library_writes_of_numpy(tmp_path):
    arrays = {"a": np.arange(12.0).reshape(3, 4), "b": np.arange(5, dtype=np.int16), "c": np.array(3, np.float32)}
    safetensors.numpy.save_file(arrays, tmp_path / "numpy.safetensors")
    for name, tensor in read_safetensors(tmp_path / "numpy.safetensors").items():
        np.testing.assert_array_equal(tensor.read(), arrays[name], strict=True)


def test_reads_a_file_without_tensors(tmp_path):
    safetensors.torch.save_file({}, tmp_path / "none.safetensors")
    assert read_safetensors(tmp_path / "none.safetensors") == {}


# Arrays whose memory is not their values in order.
STRIDED = {
    "transposed": np.arange(24, dtype=np.float32).reshape(2, 3, 4).transpose(2, 0, 1),
    "fortran": np.asfortranarray(np.arange(6, dtype=np.float64).reshape(2, 3)),
    "sliced": np.arange(24, dtype=np.int32).reshape(4, 6)[1:3, ::2],
    "reversed": np.arange(7, dtype=np.float16)[::-1],
    "broadcast": np.broadcast_to(np.float32(2.5), (3, 4)),
    "row repeated": np.broadcast_to(np.arange(3, dtype=np.int8), (4, 3)),
    "diagonal": np.lib.stride_tricks.as_strided(np.arange(9, dtype=np.uint16), (3,), (8,)),
    "0-d": np.array(4, ml_dtypes.bfloat16),
    "empty": np.zeros((3, 0, 2), ml_dtypes.float8_e5m2).T,
    "bfloat16": np.arange(6).astype(ml_dtypes.bfloat16).reshape(2, 3).T,
    "float8": np.arange(6).astype(ml_dtypes.float8_e4m3fn).reshape(2, 3).T,
    "bool": (np.arange(6) % 2 == 0).reshape(2, 3).T,
}


def write(path: pathlib.Path, arrays: dict[str, np.ndarray], **options) -> None:
    write_safetensors(path, {name: (a.dtype, a.shape) for name, a in arrays.items()}, arrays.__getitem__, **options)


def test_library_reads_what_we_write(tmp_path):
    path = tmp_path / "strided.safetensors"
    write(path, STRIDED, metadata={"format": "pt", "text": "ü\n"})
    tensors = safetensors.torch.load_file(path)
    assert set(tensors) == set(STRIDED)
    for name, array in STRIDED.items():
        assert TORCH_DTYPES[tensors[name].dtype] == array.dtype, name
        assert tuple(tensors[name].shape) == array.shape, name
        # One by one, whatever the strides.
        assert bits(tensors[name]) == b"".join(value.tobytes() for value in array.flat), name
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "text": "ü\n"}


def test_library_reads_every_dtype_and_shape_we_write(tmp_path):
    expected = everything()
    write(
        tmp_path / "all.safetensors",
        {name: np.frombuffer(bits(t), TORCH_DTYPES[t.dtype]).reshape(t.shape) for name, t in expected.items()},
    )
    tensors = safetensors.torch.load_file(tmp_path / "all.safetensors")
    assert {name: (t.dtype, t.shape, bits(t)) for name, t in tensors.items()} == {
        name: (t.dtype, t.shape, bits(t)) for name, t in expected.items()
    }


def test_tensors_start_at_multiples_of_their_element_size(tmp_path):
    write(tmp_path / "odd.safetensors", {"a": np.ones(3, np.int8), "b": np.ones(2), "c": np.ones(1, np.float16)})
    for tensor in read_safetensors(tmp_path / "odd.safetensors").values():
        assert tensor.offset % tensor.dtype.itemsize == 0


def test_library_writes_transposed_arrays_wrongly(tmp_path):
    """Why we write the format ourselves: release 0.8 writes memory, not values."""
    array = np.arange(6, dtype=np.float32).reshape(2, 3).T
    safetensors.numpy.save_file({"a": array}, tmp_path / "a.safetensors")
    read = safetensors.numpy.load_file(tmp_path / "a.safetensors")["a"]
    if np.array_equal(read, array):
        pytest.skip("the installed release is right")
    np.testing.assert_array_equal(np.sort(read, axis=None), np.arange(6))


@pytest.mark.parametrize(
    "given", [np.ones((2, 3)), np.ones((3, 2), np.float32), np.ones((2, 3), ">f4"), np.ones((2, 3, 1), np.float32)]
)
def test_other_dtype_or_shape_than_promised_is_an_error(tmp_path, given):
    with pytest.raises(ValueError, match=r"'a' is .*, expected float32 \(2, 3\)"):
        write_safetensors(tmp_path / "a.safetensors", {"a": (np.float32, (2, 3))}, lambda name: given)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", [np.complex64, ">f4", "U3"])
def test_dtype_without_a_name_is_an_error(tmp_path, dtype):
    with pytest.raises(ValueError, match="'a' has dtype .* which safetensors has no name for"):
        write(tmp_path / "a.safetensors", {"a": np.ones(2).astype(dtype)})
    assert list(tmp_path.iterdir()) == []


def test_failed_write_leaves_the_earlier_file(tmp_path):
    path = tmp_path / "a.safetensors"
    write(path, {"a": np.ones(2)})
    before = path.read_bytes()

    def read(name: str) -> np.ndarray:
        if name == "b":
            raise OSError("the disk is gone")
        return np.zeros(2)

    with pytest.raises(OSError, match="the disk is gone"):
        write_safetensors(path, {"a": (np.float64, (2,)), "b": (np.float64, (2,))}, read)
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]
    assert path.read_bytes() == before


def test_file_that_shrank_since_its_header_was_read(tmp_path):
    safetensors.torch.save_file({"a": torch.ones(100)}, tmp_path / "a.safetensors")
    tensor = read_safetensors(tmp_path / "a.safetensors")["a"]
    os.truncate(tmp_path / "a.safetensors", 300)
    with pytest.raises(ValueError, match="a.safetensors ends inside 'a'"):
        tensor.read()


# .pth


def test_reads_every_dtype_and_shape_of_torch(tmp_path):
    expected = everything()
    torch.save(expected, tmp_path / "all.pth")
    assert_read(read_pth(tmp_path / "all.pth"), expected)


def test_reads_views_and_shared_storages(tmp_path):
    storage = torch.arange(60.0).reshape(3, 4, 5)
    half = torch.arange(12).to(torch.bfloat16).reshape(3, 4)
    expected = {
        "whole": storage,
        "transposed": storage.permute(2, 0, 1),
        "sliced": storage[1:, ::2, 1:4],
        "column": storage[:, 1, 3],
        "expanded": storage[0, 0, :1].expand(4, 2, 1),
        "diagonal": storage[0].diagonal(1),
        "element": storage[2, 3, 4],
        "empty": storage[3:, 1],
        "bfloat16": half.T,
        "float8": half.to(torch.float8_e5m2)[:, 1:].T,
        "channels last": torch.arange(48.0).reshape(1, 3, 4, 4).to(memory_format=torch.channels_last),
    }
    torch.save(expected, tmp_path / "views.pth")
    assert_read(read_pth(tmp_path / "views.pth"), expected)


def test_reads_state_dicts(tmp_path):
    linear = torch.nn.Linear(3, 2)
    contents = {
        "module": linear.state_dict(),  # an OrderedDict with metadata
        "parameters": linear.state_dict(keep_vars=True),
        "nested": {"state_dict": linear.state_dict()},
    }
    for name, content in contents.items():
        torch.save(content, tmp_path / f"{name}.pth")
        assert_read(read_pth(tmp_path / f"{name}.pth"), {"weight": linear.weight.data, "bias": linear.bias.data})


class Command:
    def __init__(self, marker: pathlib.Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def test_pickled_command_does_not_run(tmp_path):
    path, marker = tmp_path / "evil.pth", tmp_path / "ran"
    torch.save({"a": torch.ones(2), "b": Command(marker)}, path)
    with pytest.raises(ValueError, match="evil.pth holds something other than tensors"):
        read_pth(path)
    assert not marker.exists()
    torch.load(path, weights_only=False)  # it would have run
    assert marker.exists()


def test_legacy_format_is_refused(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match="old.pth is no checkpoint that torch.save wrote as a zip archive"):
        read_pth(tmp_path / "old.pth")


def test_script_archive_is_refused(tmp_path):
    torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)).save(str(tmp_path / "script.pth"))
    with pytest.raises(ValueError, match="script.pth"):
        read_pth(tmp_path / "script.pth")


@pytest.mark.parametrize("version", ["2.9.1+cu128", "1.13.0", "2.5.0a0+git1234"])
def test_old_torch_is_refused(tmp_path, monkeypatch, version):
    torch.save({"a": torch.ones(2)}, tmp_path / "a.pth")
    monkeypatch.setattr(torch, "__version__", version)
    with pytest.raises(ImportError, match=f"a.pth: torch {re.escape(version)} cannot load it safely"):
        read_pth(tmp_path / "a.pth")


def test_missing_torch_is_named(tmp_path, monkeypatch):
    torch.save({"a": torch.ones(2)}, tmp_path / "a.pth")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match=r"a.pth is a torch checkpoint; reading it needs torch: pip install"):
        read_pth(tmp_path / "a.pth")


def test_checksums_of_records(tmp_path):
    path = tmp_path / "a.pth"
    torch.save({"a": torch.ones(100), "b": torch.zeros(50)}, path)
    check_pth(path)
    content = bytearray(path.read_bytes())
    content[read_pth(path)["b"].offset + 7] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="a.pth is damaged: its record 'a/data/1' does not match its checksum"):
        check_pth(path)
    # torch itself sees nothing, which is why we look.
    assert torch.load(path, weights_only=True)["b"].count_nonzero() == 1


# 8-bit floats with scales

WEIGHT = content_of(torch.float32, (12, 8), 1).nan_to_num(0, 0, 0).clamp(-400, 400)
# A name, and the factor of every element that its shape stands for.
SCALES = {
    "one": torch.tensor(0.037),
    "one in a list": torch.tensor([0.037]),
    "one, as a matrix": torch.tensor([[0.037]]),
    "per row": torch.rand(12, 1, generator=torch.Generator().manual_seed(0)),
    "per block": torch.rand(12, 4, 1, generator=torch.Generator().manual_seed(1)),
    "per row, as a block": torch.rand(12, 1, 1, generator=torch.Generator().manual_seed(2)),
    "bfloat16": torch.rand(12, 1, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16),
}


def quant(format_name: str) -> torch.Tensor:
    return torch.tensor(list(json.dumps({"format": format_name}).encode()), dtype=torch.uint8)


# What marks a quantised file, by who writes it: the ending of scales, and what else is in it.
SPELLINGS: dict[str, tuple[str, dict[str, torch.Tensor]]] = {
    "ComfyUI, earlier": (
        "scale_weight",
        {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn), "a.scale_input": torch.tensor(3.0)},
    ),
    "ComfyUI": ("weight_scale", {"a.comfy_quant": quant("float8_e4m3fn"), "a.input_scale": torch.tensor(3.0)}),
    "musubi-tuner": ("scale_weight", {}),
}


@pytest.mark.parity
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("scale", SCALES)
def test_scaled_values_are_those_of_torch(tmp_path, scale, spelling, dtype):
    ending, others = SPELLINGS[spelling]
    weight, factor = WEIGHT.to(dtype), SCALES[scale]
    content = {"a.weight": weight, f"a.{ending}": factor, "a.bias": torch.ones(12), **others}
    safetensors.torch.save_file(content, tmp_path / "a.safetensors")
    tensors = dequantised(read_safetensors(tmp_path / "a.safetensors"))
    assert set(tensors) == {"a.weight", "a.bias"}
    assert isinstance(tensors["a.weight"], ScaledTensor)

    blocks = factor.float().reshape(12, -1) if factor.numel() > 1 else factor.float().reshape(1, 1).expand(12, 1)
    expected = weight.float() * blocks.repeat_interleave(8 // blocks.shape[1], dim=1)
    values = tensors["a.weight"].read()
    assert values.dtype == np.float32
    assert values.tobytes() == bits(expected)


@pytest.mark.parity
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_unscaled_values_are_those_of_torch(tmp_path, dtype):
    every = torch.arange(256, dtype=torch.uint8).view(dtype)  # infinities and NaN too
    safetensors.torch.save_file({"a.weight": every}, tmp_path / "a.safetensors")
    values = dequantised(read_safetensors(tmp_path / "a.safetensors"))["a.weight"].read().astype(np.float32)
    np.testing.assert_array_equal(values, every.float().numpy())
    assert (np.signbit(values) == torch.signbit(every.float()).numpy())[~np.isnan(values)].all()


# What could run code


def calls(path: pathlib.Path) -> list[ast.Call]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


def keyword(call: ast.Call, name: str) -> Any:
    return next((ast.literal_eval(each.value) for each in call.keywords if each.arg == name), None)


RUNS_CODE = re.compile(
    r"eval|exec|compile|__import__|(c?pickle|dill|joblib|marshal|shelve|cloudpickle)\..*|Unpickler|"
    r"yaml\.(unsafe_|full_)?load(_all)?|os\.(system|popen)|torch\.(jit\.load|hub\..*)"
)


@pytest.mark.parametrize(
    "path", [*ROOT.glob("*.py"), *ROOT.glob("magref_jax/**/*.py")], ids=lambda path: str(path.relative_to(ROOT))
)
def test_nothing_that_is_read_can_run_code(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not imported & {"pickle", "dill", "joblib", "marshal", "shelve", "cloudpickle"}
    for call in calls(path):
        function = ast.unparse(call.func)
        assert not RUNS_CODE.fullmatch(function), f"line {call.lineno}"
        assert not keyword(call, "allow_pickle") if function.startswith(("np.", "numpy.")) else True
        if function == "torch.load":
            assert path.name == "tensor_files.py"
            assert keyword(call, "weights_only") is True
