"""End to end on a tiny random model: what a video depends on, what it does not, and what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magref_jax import pipeline
from magref_jax.models import vae
from magref_jax.models.image_encoder import ImageEncoder
from magref_jax.pipeline import Request, generate
from magref_jax.sharding import make_mesh
from tests.tiny_model import CONFIG, model_folder, picture, random_params  # noqa: F401

PROMPT = "the red apple slides right over a meadow and the blue fish rises"


@pytest.fixture(scope="module")
def model(model_folder):  # noqa: F811
    return pipeline.load(model_folder)


def request(prompt=PROMPT, seed=1, key="one", subjects=("red apple", "blue fish"), **kwargs):
    return Request(prompt, [picture((250, 20, 20)), picture((20, 20, 250))], subjects, seed, key=key, **kwargs)


@pytest.fixture(scope="module")
def video(model):
    return generate(model, [request()])[0]


def difference(first, second):
    return np.abs(first.frames.astype(int) - second.frames.astype(int)).max()


def test_frames_have_the_size_of_the_config_without_the_dropped_ones(video):
    assert video.frames.dtype == np.uint8
    assert video.frames.shape == (CONFIG.sampling.num_frames - 1, 16, 24, 3)
    assert len(np.unique(video.frames)) > 50


def test_dropped_frames_are_the_first_ones(model, video):
    whole = dataclasses.replace(model, config=dataclasses.replace(model.config, drop_frames=0))
    frames = generate(whole, [request()])[0].frames
    assert len(frames) == 5
    assert np.abs(frames[1:].astype(int) - video.frames).max() <= 1


def test_same_seed_and_key_give_the_same_bytes(model, video):
    np.testing.assert_array_equal(generate(model, [request()])[0].frames, video.frames)


@pytest.mark.parametrize("change", [{"seed": 2}, {"key": "two"}, {"prompt": PROMPT + " left"}, {"subjects": ()}])
def test_seed_key_prompt_and_subject_words_each_change_the_video(model, video, change):
    assert difference(generate(model, [request(**change)])[0], video) > 1


def test_a_batch_is_its_requests_one_by_one(model, video):
    other = request(prompt="a blue fish", seed=7, key="two", subjects=(None, "blue fish"))
    batch = generate(model, [other, request()])
    assert difference(batch[1], video) <= 1
    assert difference(batch[0], generate(model, [other])[0]) <= 1


def test_noise_is_unit_normal_and_does_not_depend_on_the_batch(model):
    config = pipeline.with_sampling(model.config, height=64, width=64, num_frames=17)
    noise = pipeline.initial_noise(config, request())
    assert noise.shape == (9, 16, 16, 16)
    assert abs(noise.mean()) < 0.02
    assert abs(noise.std() - 1) < 0.02
    # The platform's generator must not matter, nor must a flag that changes how bits are laid out.
    with jax.threefry_partitionable(False), jax.default_prng_impl("rbg"):
        np.testing.assert_array_equal(pipeline.initial_noise(config, request()), noise)
    assert np.abs(np.corrcoef(noise.ravel(), pipeline.initial_noise(config, request(key="two")).ravel())[0, 1]) < 0.02


def test_order_of_the_canvas_is_drawn_from_seed_and_key_or_pinned(model):
    config = pipeline.with_sampling(model.config, layout="v2")
    cells = {
        key: pipeline.prepare(config, model.tokenizer, request(key=key)).canvas.cells for key in map(str, range(8))
    }
    assert set(cells.values()) == {((0, 0, 12, 16), (12, 0, 24, 16)), ((12, 0, 24, 16), (0, 0, 12, 16))}
    pinned = pipeline.prepare(config, model.tokenizer, request(order="1,0"))
    assert pinned.canvas.cells == ((12, 0, 24, 16), (0, 0, 12, 16))


def lowered(model, **overrides):
    config = pipeline.with_sampling(model.config, **overrides)
    case = pipeline.prepare(config, model.tokenizer, request())
    arrays = pipeline.stack_cases([case])
    negative = (case.token_ids[None], case.attention_mask[None])
    noise = pipeline.initial_noise(config, request())[None]
    return pipeline._sample.lower(model.params, arrays, negative, noise, config=config, on_step=None)


def test_guidance_of_1_evaluates_the_dit_once_per_step(model):
    # A dot product of the loop over steps is in the program once per branch; 0.49 because of the encoders and the VAE.
    counts = {
        scale: lowered(model, guidance_scale=scale).as_text().count("stablehlo.dot_general") for scale in (1.0, 2.0)
    }
    dit = jax.jit(lambda p, x: pipeline.DiT(CONFIG.dit).apply({"params": p}, x, *dit_arguments())).lower(
        model.params["dit"], jnp.zeros((1, 3, 4, 6, 36))
    )
    assert counts[2.0] - counts[1.0] >= dit.as_text().count("stablehlo.dot_general")


def dit_arguments():
    cfg = CONFIG.dit
    tokens = CONFIG.image_encoder.num_tokens
    return jnp.zeros((1,)), jnp.zeros((1, cfg.text_len, cfg.text_dim)), jnp.zeros((1, tokens, cfg.image_dim))


def test_the_negative_prompt_matters_exactly_with_guidance(model, video):
    other = {"negative_prompt": "a meadow"}
    assert difference(generate(model, [request()], **other)[0], video) > 1
    alone = generate(model, [request()], guidance_scale=1.0)[0]
    assert difference(generate(model, [request()], guidance_scale=1.0, **other)[0], alone) == 0


def test_prompts_of_any_length_and_any_negative_prompt_share_one_program(model, video):
    before = pipeline._sample._cache_size()
    generate(model, [request(prompt="the red apple and the blue fish")], negative_prompt="")
    assert pipeline._sample._cache_size() == before


def test_steps_are_reported_in_order(model):
    steps = []
    generate(model, [request()], on_step=steps.append, solver="euler", num_inference_steps=4)
    jax.effects_barrier()
    assert steps == [0, 1, 2, 3]


def test_parameters_are_loaded_as_stored_and_computed_with_in_float32(model):
    assert {leaf.dtype for leaf in jax.tree.leaves(model.params)} == {jnp.bfloat16.dtype}
    # The tiny model runs in float32. A cast from bfloat16 is exact, so casting before or while computing is the same,
    # unless some layer computes in the dtype of its parameters.
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), model.params)
    case = pipeline.prepare(CONFIG, model.tokenizer, request())
    arrays = pipeline.stack_cases([case])
    noise = pipeline.initial_noise(CONFIG, request())[None]

    @jax.jit
    def everything(params):
        conditioning = pipeline.encode_cases(pipeline.encoders(CONFIG, params), arrays, CONFIG.sampling.num_frames)
        velocity = pipeline.velocity_fn(CONFIG, params["dit"], conditioning)(noise, jnp.full((1,), 500.0))
        return conditioning, velocity, pipeline.decode(CONFIG, params["vae"], noise)

    for found, expected in zip(
        jax.tree.leaves(everything(model.params)), jax.tree.leaves(everything(wide)), strict=True
    ):
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, expected, atol=2e-5)


def test_large_clips_stream_through_the_vae(model, monkeypatch):
    latents = jax.random.normal(jax.random.key(0), (1, 3, 4, 6, 16))
    whole = pipeline.decode(CONFIG, model.params["vae"], latents)
    monkeypatch.setattr(pipeline, "STREAM_PIXELS", 3 * 2 * 16 * 24 - 1)
    monkeypatch.setattr(vae, "decode", None)
    np.testing.assert_allclose(pipeline.decode(CONFIG, model.params["vae"], latents), whole, atol=1e-5)


def test_text_to_video_without_references_runs_and_refuses_them(model):
    config = dataclasses.replace(
        CONFIG,
        dit=dataclasses.replace(CONFIG.dit, in_channels=16, image_dim=None),
        image_encoder=None,
        subject_alpha=0.0,
        drop_frames=0,
    )
    text_to_video = pipeline.Model(config, random_params(config), model.tokenizer)
    videos = generate(text_to_video, [Request("a fish", seed=1), Request("a red apple", seed=1)])
    assert videos[0].frames.shape == (5, 16, 24, 3)
    assert difference(*videos) > 1
    with pytest.raises(ValueError, match="2 reference images given, but this is a text-to-video model"):
        generate(text_to_video, [request()])


def test_a_mesh_gives_the_same_videos_and_rounds_the_batch_up(model, video):
    videos = generate(model, [request()], mesh=make_mesh("data=2,fsdp=2,tensor=2"))
    assert len(videos) == 1
    assert difference(videos[0], video) <= 1


def test_a_model_can_be_loaded_onto_a_mesh(model, model_folder):  # noqa: F811
    mesh = make_mesh("fsdp=-1")
    sharded = pipeline.load(model_folder, mesh=mesh)
    kernel = sharded.params["dit"]["blocks"]["feed_forward"]["up"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (2, 3, 32)  # dim 24 in 8 parts
    jax.tree.map(np.testing.assert_array_equal, sharded.params, model.params)


def test_no_requests_are_no_videos(model):
    assert generate(model, []) == []


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"height": 20}, r"height=20 must be a positive multiple of 8"),
        ({"width": 0}, r"width=0 must be a positive multiple of 8"),
        ({"num_frames": 6}, r"num_frames=6 must be 2n \+ 1"),
        ({"num_frames": 1}, r"num_frames=1 leaves no video"),
        ({"num_inference_steps": 0}, r"num_inference_steps=0 must be at least 1"),
        ({"flow_shift": 0.0}, r"flow_shift=0.0 must be positive"),
        ({"guidance_scale": float("nan")}, r"guidance_scale=nan must be a finite"),
        ({"solver": "ddim"}, r"solver='ddim' is unknown; choose from unipc, dpm\+\+, euler"),
        ({"layout": "v3"}, r"layout='v3' is unknown; choose from v1, v2"),
        ({"mask_mode": "none"}, r"mask_mode='none' is unknown; choose from region, full"),
        ({"steps": 3}, r"'steps' is not a sampling option; there are height, width"),
    ],
)
def test_options_a_model_cannot_take_are_refused_by_name(model, overrides, message):
    with pytest.raises(ValueError, match=message):
        generate(model, [request()], **overrides)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"subjects": ("red apple", "green fish")}, "'green fish' is not in the prompt. Words of the prompt: the, red"),
        ({"subjects": ("red apple",)}, "1 subjects given for 2 reference images"),
        ({"images": [picture((1, 2, 3))] * 4, "subjects": ()}, "4 reference images given, but layout 'v1' holds"),
        ({"images": [picture((1, 2, 3), (900, 2))], "subjects": ()}, "too elongated"),
        ({"order": "0,0"}, "must name each of the 2 references"),
    ],
)
def test_requests_a_model_cannot_take_are_refused(model, changes, message):
    wrong = dataclasses.replace(request(), **changes)
    config = pipeline.with_sampling(model.config, layout="v2") if "order" in changes else model.config
    with pytest.raises(ValueError, match=message):
        pipeline.prepare(config, model.tokenizer, wrong)


def test_image_encoder_of_the_model_sees_the_whole_canvas(model, monkeypatch):
    seen = []
    original = ImageEncoder.__call__

    def spy(self, pixels):
        seen.append(pixels.shape)
        return original(self, pixels)

    monkeypatch.setattr(ImageEncoder, "__call__", spy)
    case = pipeline.prepare(CONFIG, model.tokenizer, request())
    jax.eval_shape(
        lambda params: pipeline.encode_cases(pipeline.encoders(CONFIG, params), pipeline.stack_cases([case]), 5),
        model.params,
    )
    assert seen == [(1, 12, 12, 3)]
