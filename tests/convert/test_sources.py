"""What a source holds, by values that are written out here. Its files are in test_tensor_files.py, its damage in test_damage.py."""

import hashlib

import numpy as np
import pytest
import safetensors.torch
import torch

from magref_jax.convert.sources import check_file, dequantised
from magref_jax.convert.tensor_files import read_safetensors

WEIGHT = torch.tensor([[1, -2, 0.5, 4], [8, 16, -0.25, 3]], dtype=torch.float8_e4m3fn)


@pytest.mark.parametrize("name", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize(
    ("scale", "expected"),
    [
        (0.5, [[0.5, -1, 0.25, 2], [4, 8, -0.125, 1.5]]),
        ([0.5], [[0.5, -1, 0.25, 2], [4, 8, -0.125, 1.5]]),
        ([[2], [-3]], [[2, -4, 1, 8], [-24, -48, 0.75, -9]]),  # one per row
        ([[[2], [-3]], [[0.5], [10]]], [[2, -4, -1.5, -12], [4, 8, -2.5, 30]]),  # one per block of two in a row
    ],
)
def test_8_bit_weights_are_multiplied_by_their_scale(tmp_path, name, scale, expected):
    file = tmp_path / "a.safetensors"
    safetensors.torch.save_file({"a.weight": WEIGHT, f"a.{name}": torch.tensor(scale).float()}, file)
    np.testing.assert_array_equal(dequantised(read_safetensors(file))["a.weight"].read(), expected)


def test_contents_are_compared_with_the_digest_of_the_download(tmp_path):
    file = tmp_path / "a.safetensors"
    safetensors.torch.save_file({"a.weight": WEIGHT}, file)
    content = file.read_bytes()
    assert "comes without a digest" in check_file(file)
    note = tmp_path / ".cache" / "huggingface" / "download" / "a.safetensors.metadata"
    note.parent.mkdir(parents=True)
    note.write_text(f"{'0' * 40}\n{hashlib.sha256(content).hexdigest()}\n1700000000.0\n")
    assert check_file(file) is None
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(
        ValueError, match=f"a.safetensors is damaged: its sha256 is .*{hashlib.sha256(content).hexdigest()}"
    ):
        check_file(file)
