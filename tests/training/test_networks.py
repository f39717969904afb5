import contextlib
import dataclasses
from collections.abc import Iterator

import jax
import numpy as np
import pytest
from flax import traverse_util

from magref_jax.checkpoint import save_params
from magref_jax.command import sentence
from magref_jax.models.dit import DiT, SubjectInjection
from magref_jax.training.networks import copy_networks, insert_blocks
from tests.models.test_dit import TINY, example_inputs, random_params

DEEPER = dataclasses.replace(TINY, num_layers=5)


def two_subjects() -> SubjectInjection:
    tokens, regions = np.zeros((2, 2, TINY.text_len), np.float32), np.zeros((2, 2, 6), np.float32)
    tokens[:, 0, 0], tokens[:, 1, 2] = 1, 1
    regions[:, 0, [3, 4]], regions[:, 1, 5] = 1, 1
    return SubjectInjection(tokens, regions)


@pytest.mark.parametrize("subjects", [None, two_subjects()], ids=["plain", "subjects"])
def test_new_blocks_add_nothing_and_can_learn(subjects: SubjectInjection | None):
    params = random_params(TINY)
    deeper = insert_blocks(params, 5)
    inputs = example_inputs(TINY)
    expected = DiT(TINY).apply({"params": params}, *inputs, subjects=subjects, subject_alpha=0.7)

    def output(params):
        return DiT(DEEPER).apply({"params": params}, *inputs, subjects=subjects, subject_alpha=0.7)

    np.testing.assert_array_equal(output(deeper), expected)

    gradient = jax.grad(lambda params: (output(params) ** 2).sum())(deeper)["blocks"]
    for name in ("self_attention/out", "cross_attention/out", "feed_forward/down"):
        kernel = traverse_util.flatten_dict(gradient, sep="/")[f"{name}/kernel"]
        assert np.all(np.abs(kernel).max(axis=(1, 2)) > 1e-3)


def test_new_blocks_are_spread_and_old_ones_kept():
    params = random_params(TINY)
    old, new = (traverse_util.flatten_dict(tree["blocks"]) for tree in (params, insert_blocks(params, 5)))
    for path, layers in old.items():
        np.testing.assert_array_equal(np.asarray(new[path])[[0, 3]], layers)  # 0 0 0 1 1
    query = ("self_attention", "query", "kernel")
    np.testing.assert_array_equal(np.asarray(new[query])[[1, 2, 4]], old[query][[0, 0, 1]])


@contextlib.contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """A disk that is full: larger files cannot be written."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_what_finds_no_room_leaves_nothing_and_has_a_name(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "vae" / "d").mkdir(parents=True)
    (source / "vae" / "d" / "values").write_bytes(bytes(5000))
    target.mkdir()
    with files_of_at_most(1000), pytest.raises(OSError, match="File too large") as raised:
        copy_networks(source, target, but="dit")
    assert sentence(raised.value).endswith("d/values: File too large")
    values = np.random.default_rng(0).standard_normal((100, 100)).astype(np.float32)
    with files_of_at_most(1000), pytest.raises(Exception, match="File too large"):
        save_params(target / "dit", {"kernel": jax.numpy.asarray(values)})
    assert list(target.iterdir()) == []
    copy_networks(source, target, but="dit")
    assert (target / "vae" / "d" / "values").read_bytes() == bytes(5000)
