import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import traverse_util

from magref_jax.config import DiTConfig
from magref_jax.models import attention
from magref_jax.models.attention import AttentionStructure, Implementation
from magref_jax.models.dit import (
    Block,
    DiT,
    SelfAttention,
    SubjectInjection,
    VideoTokens,
    encode_context,
    inject_subjects,
)
from magref_jax.models.layers import rotary_rotations
from magref_jax.sharding import make_mesh, on_mesh

TINY = DiTConfig(
    dim=24,
    ffn_dim=40,
    num_heads=2,
    num_layers=2,
    in_channels=6,
    out_channels=3,
    text_dim=10,
    text_len=5,
    image_dim=14,
    freq_dim=16,
    dtype="float32",
    remat="none",
)
WAN_T2V_14B = DiTConfig(in_channels=16, image_dim=None)
WAN_T2V_1_3B = dataclasses.replace(WAN_T2V_14B, dim=1536, ffn_dim=8960, num_heads=12, num_layers=30)


def example_inputs(config: DiTConfig, seed: int = 0) -> tuple[np.ndarray | None, ...]:
    rng = np.random.default_rng(seed)
    latents = rng.standard_normal((2, 3, 4, 6, config.in_channels)).astype(np.float32)
    text = rng.standard_normal((2, config.text_len, config.text_dim)).astype(np.float32)
    text[:, 3:] = 0.0
    image = None if config.image_dim is None else rng.standard_normal((2, 4, config.image_dim)).astype(np.float32)
    return latents, np.array([999.0, 20.0], np.float32), text, image


def abstract_params(config: DiTConfig) -> Any:
    shapes = [(1, 1, 2, 2, config.in_channels), (1,), (1, config.text_len, config.text_dim)]
    inputs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    if config.image_dim is not None:
        inputs.append(jax.ShapeDtypeStruct((1, 257, config.image_dim), jnp.float32))
    return jax.eval_shape(DiT(config).init, jax.random.key(0), *inputs)["params"]


def random_params(config: DiTConfig) -> Any:
    """Parameters of unit scale, so that gates, head and modulation all matter."""
    rng = np.random.default_rng(7)
    flat = traverse_util.flatten_dict(abstract_params(config))
    fan_in = {path: leaf.shape[-2] if path[-1] == "kernel" else 4 for path, leaf in flat.items()}
    return traverse_util.unflatten_dict(
        {
            path: ((path[-1] == "scale") + rng.standard_normal(leaf.shape) / np.sqrt(fan_in[path])).astype(np.float32)
            for path, leaf in flat.items()
        }
    )


@pytest.fixture(scope="module")
def params() -> Any:
    return random_params(TINY)


@pytest.fixture(scope="module")
def velocity(params: Any) -> np.ndarray:
    return np.asarray(jax.jit(DiT(TINY).apply)({"params": params}, *example_inputs(TINY)))


@pytest.mark.parametrize(
    ("config", "count"),
    [(DiTConfig(), 16_394_878_784), (WAN_T2V_14B, 14_288_491_584), (WAN_T2V_1_3B, 1_418_996_800)],
    ids=["magref_14b", "wan_t2v_14b", "wan_t2v_1_3b"],
)
def test_released_models_have_their_published_parameter_counts(config: DiTConfig, count: int):
    assert sum(leaf.size for leaf in jax.tree.leaves(abstract_params(config))) == count


def test_initial_weights():
    params = jax.jit(DiT(TINY).init)(jax.random.key(0), *example_inputs(TINY))["params"]
    up = np.asarray(params["blocks"]["feed_forward"]["up"]["kernel"])

    assert not params["head"]["out"]["kernel"].any()  # the first velocity is 0
    assert not params["blocks"]["self_attention"]["query"]["bias"].any()
    assert np.abs(up[0] - up[1]).max() > 0.1  # layers start apart
    limit = np.sqrt(6 / (24 + 40))
    assert 0.9 * limit < np.abs(up).max() <= limit
    np.testing.assert_allclose(np.std(params["time_out"]["kernel"]), 0.02, rtol=0.15)
    np.testing.assert_allclose(np.std(params["blocks"]["modulation"]), 24**-0.5, rtol=0.15)


def test_equal_timesteps_per_frame_equal_one_per_clip(params: Any, velocity: np.ndarray):
    latents, timesteps, text, image = example_inputs(TINY)
    per_frame = np.repeat(timesteps[:, None], 3, axis=1)
    actual = jax.jit(DiT(TINY).apply)({"params": params}, latents, per_frame, text, image)
    np.testing.assert_allclose(actual, velocity, rtol=0, atol=1e-6)


def test_timestep_of_a_frame_modulates_that_frame_alone_before_tokens_mix(params: Any):
    # With self-attention closed by a zero output projection nothing else carries the timestep between frames.
    flat = traverse_util.flatten_dict(params)
    path = ("blocks", "self_attention", "out", "kernel")
    closed = traverse_util.unflatten_dict({**flat, path: np.zeros_like(flat[path])})
    latents, _, text, image = example_inputs(TINY)
    run = jax.jit(DiT(TINY).apply)

    before = run({"params": closed}, latents, np.full((2, 3), 500.0), text, image)
    after = run({"params": closed}, latents, np.array([[500.0, 100.0, 500.0]] * 2), text, image)

    changed = np.abs(np.asarray(after - before)).max(axis=(0, 2, 3, 4))
    assert changed[1] > 0.1
    np.testing.assert_array_equal(changed[[0, 2]], 0.0)


def test_text_padding_is_attended(params: Any, velocity: np.ndarray):
    latents, timesteps, text, image = example_inputs(TINY)
    text[:, -1] = 1.0
    actual = jax.jit(DiT(TINY).apply)({"params": params}, latents, timesteps, text, image)
    assert np.abs(actual - velocity).max() > 0.01


def test_precision_of_a_bfloat16_model():
    config = dataclasses.replace(TINY, dtype="bfloat16")
    model = DiT(config)
    _, state = jax.eval_shape(
        lambda params, *inputs: model.apply(
            {"params": params}, *inputs, capture_intermediates=True, mutable=["intermediates"]
        ),
        abstract_params(config),
        *example_inputs(config),
    )
    flat = traverse_util.flatten_dict(state["intermediates"], sep="/")
    dtypes = {path.removesuffix("/__call__"): jax.tree.leaves(leaves)[0].dtype for path, leaves in flat.items()}

    float32 = {path for path, dtype in dtypes.items() if dtype == jnp.float32}
    islands = {path for path in dtypes if path.endswith("_norm") or path.startswith(("head", "time_"))}
    assert float32 == islands | {"blocks", "__call__"}  # the residual stream and the velocity
    assert {dtype for path, dtype in dtypes.items() if path not in float32} == {jnp.dtype(jnp.bfloat16)}


def in_bfloat16(array: np.ndarray) -> np.ndarray:
    """Rounded, so that a bfloat16 layer passes it on as it is."""
    return array.astype(ml_dtypes.bfloat16).astype(np.float32)


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def normalised(x: np.ndarray, eps: float) -> np.ndarray:
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt(np.square(x).mean(-1, keepdims=True) + eps)


def test_a_bfloat16_model_rounds_in_its_matrix_products_alone():
    # Every layer in bfloat16 returns its bias, which bfloat16 holds, so that all the rest can be followed in float64:
    # timestep, modulation and gates, the residual stream, the norm and the head.
    config = dataclasses.replace(TINY, dtype="bfloat16", image_dim=None)
    flat = traverse_util.flatten_dict(random_params(config), sep="/")
    for path in flat:
        if re.search(r"blocks/.*/(out|down)/kernel|patch_embedding/kernel", path):
            flat[path] = np.zeros_like(flat[path])
        elif re.search(r"blocks/.*/(out|down)/bias|patch_embedding/bias", path):
            # The stream starts large: in bfloat16 it would lose most of what the layers add.
            flat[path] = in_bfloat16(flat[path] * (40 if path.startswith("patch") else 4))
    latents, _, text, _ = example_inputs(config)
    timesteps = np.array([[999.0, 3.0, 400.0], [20.0, 700.5, 0.0]], np.float32)
    params = traverse_util.unflatten_dict(flat, sep="/")

    found = np.asarray(jax.jit(DiT(config).apply)({"params": params}, latents, timesteps, text))

    wide = {path: array.astype(np.float64) for path, array in flat.items()}
    angles = timesteps[..., None] * 10000.0 ** (-np.arange(8) / 8)
    time = np.concatenate([np.cos(angles), np.sin(angles)], -1) @ wide["time_in/kernel"] + wide["time_in/bias"]
    time = silu(time) @ wide["time_out/kernel"] + wide["time_out/bias"]
    of_blocks = silu(time) @ wide["time_modulation/kernel"] + wide["time_modulation/bias"]
    x = np.broadcast_to(wide["patch_embedding/bias"], (2, 3, 24))
    for layer in range(config.num_layers):
        gates = (wide["blocks/modulation"][layer] + of_blocks.reshape(2, 3, 6, 24))[:, :, [2, 5]]
        attended, crossed, fed = (
            wide[f"blocks/{name}/bias"][layer]
            for name in ("self_attention/out", "cross_attention/out", "feed_forward/down")
        )
        x = x + attended * gates[:, :, 0] + crossed + fed * gates[:, :, 1]
    shift, scale = np.moveaxis(wide["head/modulation"] + time[:, :, None], 2, 0)
    out = (normalised(x, 1e-6) * (1 + scale) + shift) @ wide["head/out/kernel"] + wide["head/out/bias"]
    expected = np.tile(out.reshape(2, 3, 1, 2, 1, 2, 3), (1, 1, 2, 1, 3, 1, 1)).reshape(2, 3, 4, 6, 3)
    assert np.std(expected) > 0.5
    # float32 rounding of values up to 20; one bfloat16 step of any of them is 1e-3 or more.
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("seen", ["query", "key"])
def test_query_and_key_are_rounded_once_after_norm_and_rotation(seen: str, monkeypatch: pytest.MonkeyPatch):
    # An attention that returns what it was given, between layers that pass on what they are given.
    given = {"query": lambda query, key, value, bias, scale: query, "key": lambda query, key, value, bias, scale: key}
    monkeypatch.setitem(attention.IMPLEMENTATIONS, "given", Implementation(given[seen]))
    config = dataclasses.replace(TINY, dtype="bfloat16", attention="given")
    rng = np.random.default_rng(4)
    x = in_bfloat16(rng.standard_normal((1, 60, 24)).astype(np.float32))
    scales = 1 + 0.3 * rng.standard_normal(24).astype(np.float32)
    identity = {"kernel": np.eye(24, dtype=np.float32), "bias": np.zeros(24, np.float32)}
    params = {name: identity for name in ("query", "key", "value", "out")}
    params |= {f"{name}_norm": {"scale": scales if name == seen else np.ones_like(scales)} for name in ("query", "key")}
    tokens = VideoTokens(rotary_rotations(range(3), range(4), range(5), 12, 10000.0), 60)

    found = SelfAttention(config).apply({"params": params}, x, tokens, attention.FULL)

    wide = x.astype(np.float64)
    wide = wide / np.sqrt(np.square(wide).mean(-1, keepdims=True) + 1e-6) * scales
    # Six pairs of channels a head: two turn with the frame, two with the row, two with the column.
    positions = np.stack(np.meshgrid(range(3), range(4), range(5), indexing="ij"), -1).reshape(60, 3)
    angles = np.concatenate([positions[:, [axis]] * np.array([1, 0.01]) for axis in range(3)], -1)
    pairs = wide.reshape(1, 60, 2, 6, 2)
    turned = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * angles)[:, None]
    exact = np.stack([turned.real, turned.imag], -1).reshape(1, 60, 24)
    # Rounded before the rotation too, a third of them would be other numbers.
    assert np.mean(np.asarray(found, np.float32) == in_bfloat16(exact.astype(np.float32))) > 0.995


def gradient(config: DiTConfig, params: Any) -> Any:
    def loss(params: Any) -> jax.Array:
        return jnp.mean(jnp.square(DiT(config).apply({"params": params}, *example_inputs(config))))

    return jax.jit(jax.grad(loss))(params)


@pytest.fixture(scope="module")
def plain_gradient(params: Any) -> Any:
    return gradient(TINY, params)


@pytest.mark.parametrize(("remat", "attention"), [("block", "reference"), ("dots", "cpu")])
def test_remat_and_attention_leave_the_gradient_as_it_is(params: Any, plain_gradient: Any, remat: str, attention: str):
    actual = gradient(dataclasses.replace(TINY, remat=remat, attention=attention), params)
    for actual_leaf, plain_leaf in zip(jax.tree.leaves(actual), jax.tree.leaves(plain_gradient), strict=True):
        # Two programs round apart by 1e-7 of the largest term of each sum.
        np.testing.assert_allclose(actual_leaf, plain_leaf, rtol=0, atol=1e-5 * (1 + np.abs(plain_leaf).max()))


def test_frame_positions_matter_by_their_distances_alone(params: Any, velocity: np.ndarray):
    def at(*positions: int) -> jax.Array:
        model = functools.partial(DiT(TINY).apply, frame_positions=positions)
        return jax.jit(model)({"params": params}, *example_inputs(TINY))

    np.testing.assert_array_equal(at(0, 1, 2), velocity)
    # The phases of rotary embedding cancel but for float32 rounding of the rotations.
    np.testing.assert_allclose(at(4, 5, 7), at(0, 1, 3), rtol=0, atol=1e-5)
    assert np.abs(at(0, 1, 3) - velocity).max() > 1e-3
    with pytest.raises(ValueError, match=r"frame_positions=\(0, 1\)"):
        at(0, 1)


def two_subjects(text_len: int = 5) -> SubjectInjection:
    """Two of three slots used; tokens (row, column) of frame 0 lie in a 2 x 3 grid and the regions share token 4."""
    tokens, regions = np.zeros((2, 3, text_len), np.float32), np.zeros((2, 3, 6), np.float32)
    tokens[:, 0, [0, 1]], tokens[:, 1, 2] = 1, 1
    regions[:, 0, [3, 4]], regions[:, 1, 4] = 1, 1
    return SubjectInjection(tokens, regions)


def test_alpha_zero_is_bitwise_the_plain_model(params: Any, velocity: np.ndarray):
    model = functools.partial(DiT(TINY).apply, subjects=two_subjects(), subject_alpha=0)
    np.testing.assert_array_equal(jax.jit(model)({"params": params}, *example_inputs(TINY)), velocity)


def test_injection_adds_the_mean_text_value_of_each_subject_in_its_region():
    rng = np.random.default_rng(3)
    x, value = rng.standard_normal((2, 18, 8)).astype(np.float32), rng.standard_normal((2, 5, 8)).astype(np.float32)
    expected = x.copy()
    expected[:, 3] += 0.5 * (value[:, 0] + value[:, 1]) / 2
    expected[:, 4] += 0.5 * ((value[:, 0] + value[:, 1]) / 2 + value[:, 2])

    np.testing.assert_allclose(inject_subjects(jnp.asarray(x), value, two_subjects(), 0.5), expected, rtol=0, atol=1e-6)
    with on_mesh(make_mesh("data=2,context=2", jax.devices()[:4])):  # tokens are cut: another way to the same sum
        found = jax.jit(inject_subjects)(x, value, two_subjects(), 0.5)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def test_injection_changes_the_first_block_inside_the_regions_of_frame_0_only(params: Any):
    def first_block(params: Any, alpha: float | jax.Array) -> jax.Array:
        _, state = DiT(TINY).apply(
            {"params": params},
            *example_inputs(TINY),
            subjects=two_subjects(),
            subject_alpha=alpha,
            capture_intermediates=lambda module, _: isinstance(module, Block),
            mutable=["intermediates"],
        )
        residual_stream, _ = state["intermediates"]["blocks"]["__call__"][0]
        return residual_stream[0]

    plain = jax.jit(first_block, static_argnums=1)(params, 0.0)
    injected = jax.jit(first_block)(params, jnp.float32(0.3))

    changed = np.abs(np.asarray(injected - plain)).max(axis=-1)
    assert (changed[:, [3, 4]] > 0.01).all()
    np.testing.assert_allclose(np.delete(changed, [3, 4], axis=1), 0.0, atol=1e-6)  # two programs, rounded apart


@pytest.mark.parametrize("image_dim", [14, None])
def test_context_and_one_padding_token_are_the_embeddings_and_all_of_them(image_dim: int | None):
    config = dataclasses.replace(TINY, image_dim=image_dim, text_len=40)
    params = random_params(config)
    latents, timesteps, text, image = example_inputs(config)  # three tokens of text, 37 of padding
    subjects = two_subjects(40)
    collapsed = dataclasses.replace(subjects, tokens=subjects.tokens[..., :4])

    @jax.jit
    def velocities(params: Any) -> list[jax.Array]:
        dit = functools.partial(DiT(config).apply, {"params": params}, latents, timesteps, subject_alpha=0.7)
        contexts = [encode_context(config, params, text[:, :length], image) for length in (40, 4)]
        return [
            dit(text, image, subjects=subjects),
            dit(context=contexts[0], subjects=subjects),
            dit(text[:, :4], image, subjects=collapsed, padding_repeats=37),
            dit(context=contexts[1], subjects=collapsed, padding_repeats=37),
        ]

    expected, *found = velocities(params)
    for velocity in found:
        np.testing.assert_allclose(velocity, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "Either text_embeddings"),
        ({"text": 5, "image": True, "context": 5}, "Either text_embeddings"),
        ({"image": True, "context": 5}, "Either text_embeddings"),
        ({"context": 4}, r"context.text.key has shape \(2, 2, 4, 24\); expected text_len=5 tokens"),
        ({"context": 5, "padding_repeats": 2}, "counts padding_repeats=2 times"),
        ({"text": 5, "image": True, "padding_repeats": 0}, "padding_repeats=0 must be 1 or more"),
    ],
)
def test_contexts_that_do_not_fit_are_errors(params: Any, arguments: dict[str, Any], message: str):
    latents, timesteps, text, image = example_inputs(TINY)

    def run() -> jax.Array:
        given = dict(arguments)
        if "context" in given:
            given["context"] = encode_context(TINY, params, text[:, : given["context"]], image)
        given["text_embeddings"] = text[:, : given.pop("text")] if "text" in given else None
        given["image_embeddings"] = image if given.pop("image", False) else None
        return DiT(TINY).apply({"params": params}, latents, timesteps, **given)

    with pytest.raises(ValueError, match=message):
        jax.eval_shape(run)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latents": (2, 3, 4, 6, 5)}, r"latents has shape \(2, 3, 4, 6, 5\); expected in_channels=6"),
        ({"latents": (2, 3, 5, 6, 6)}, r"multiples of patch_size=\(1, 2, 2\)"),
        ({"timesteps": (2, 2)}, r"timesteps has shape \(2, 2\); expected \(2,\) or \(2, 3\)"),
        ({"text_embeddings": (2, 4, 10)}, r"text_embeddings has shape \(2, 4, 10\); expected text_len=5"),
        ({"image_embeddings": None}, r"image_embeddings is None, but the model has image_dim=14"),
    ],
)
def test_wrong_shapes_are_errors(change: dict[str, tuple[int, ...] | None], message: str):
    names = ("latents", "timesteps", "text_embeddings", "image_embeddings")
    inputs = dict(zip(names, example_inputs(TINY), strict=True))
    inputs |= {name: None if shape is None else np.zeros(shape, np.float32) for name, shape in change.items()}
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: DiT(TINY).init(jax.random.key(0), *inputs.values()))


def test_subjects_of_another_size_are_an_error(params: Any):
    subjects = SubjectInjection(np.zeros((2, 1, 5)), np.zeros((2, 1, 7)))
    with pytest.raises(ValueError, match=r"regions \(2, 1, 7\); expected 5 text tokens and 6 tokens"):
        jax.eval_shape(lambda: DiT(TINY).apply({"params": params}, *example_inputs(TINY), subjects=subjects))


def test_unknown_structure_reaches_the_attention(params: Any):
    structure = AttentionStructure("spiral")
    with pytest.raises(NotImplementedError, match="'spiral'"):
        jax.eval_shape(lambda: DiT(TINY).apply({"params": params}, *example_inputs(TINY), structure=structure))
