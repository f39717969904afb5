"""End to end on a tiny random model: what a video depends on, what it does not, and what is refused."""

import dataclasses
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magref_jax import pipeline
from magref_jax.models import vae
from magref_jax.pipeline import Request, generate
from magref_jax.sharding import make_mesh
from tests.tiny_model import CONFIG, model_folder, picture, random_params  # noqa: F401

GREEN = picture((20, 250, 20))
PROMPT = "the red apple slides right over a meadow and the blue fish rises"


@pytest.fixture(scope="module")
def model(model_folder):  # noqa: F811
    return pipeline.load(model_folder)


def request(prompt=PROMPT, seed=1, key="one", subjects=("red apple", "blue fish"), **kwargs):
    return Request(prompt, [picture((250, 20, 20)), picture((20, 20, 250))], subjects, seed, key=key, **kwargs)


@pytest.fixture(scope="module")
def video(model):
    (video,) = generate(model, [request()])
    return video


@pytest.fixture(scope="module")
def batch(model):
    """Two requests at once, by a model that drops no frames."""
    whole = dataclasses.replace(model, config=dataclasses.replace(model.config, drop_frames=0))
    other = request(prompt="a blue fish", seed=7, key="two", subjects=(None, "blue fish"))
    return list(generate(whole, [other, request()]))


def difference(first, second):
    return np.abs(first.astype(int) - second.astype(int)).max()


def test_frames_have_the_size_of_the_config(video):
    assert video.frames.dtype == np.uint8
    assert video.frames.shape == (CONFIG.sampling.num_frames - CONFIG.drop_frames, 8, 12, 3)
    assert len(np.unique(video.frames)) > 50


def test_a_batch_is_its_requests_one_by_one_and_drops_the_leading_frames(model, video, batch):
    assert len(batch[1].frames) == CONFIG.sampling.num_frames
    assert difference(batch[1].frames[1:], video.frames) <= 1
    alone = generate(model, [request(prompt="a blue fish", seed=7, key="two", subjects=(None, "blue fish"))])
    assert difference(batch[0].frames[1:], alone.frames[0]) <= 1


def test_same_seed_and_key_give_the_same_bytes(model, video):
    np.testing.assert_array_equal(generate(model, [request()]).frames[0], video.frames)


@pytest.mark.parametrize(
    "change", [{"seed": 2}, {"key": "two"}, {"prompt": PROMPT + " left"}, {"subjects": ()}, {"images": [GREEN, GREEN]}]
)
def test_seed_key_prompt_subject_words_and_references_each_change_the_video(model, video, change):
    assert difference(generate(model, [dataclasses.replace(request(), **change)]).frames[0], video.frames) > 1


def door(**changes):
    """Arguments of `Model.generate` for `request(key="0")`."""
    one = request()
    arguments = {"prompts": [one.prompt], "references": [one.images], "subjects": [one.subjects], "seed": one.seed}
    return arguments | changes


def test_the_door_makes_the_videos_of_its_requests_with_the_same_program(model, video):
    before = pipeline._sample._cache_size()
    result = model.generate(**door())
    assert pipeline._sample._cache_size() == before
    expected = generate(model, [request(key="0")])
    np.testing.assert_array_equal(result.frames, expected.frames)
    assert result.frames.shape == (1, 4, 8, 12, 3)
    assert (result.latents.dtype, result.latents.shape) == (np.float32, (1, 3, 4, 6, 16))
    np.testing.assert_array_equal(result.canvas[0], video.case.canvas.image)
    np.testing.assert_array_equal(result.region_mask[0], video.case.region_mask)
    assert result.trajectory is None


def test_given_noise_takes_the_place_of_the_drawn_one(model, video):
    noise = pipeline.draw_noise(model.config, request())[None]
    np.testing.assert_array_equal(model.generate(**door(seed=5, initial_noise=noise)).frames[0], video.frames)
    assert difference(model.generate(**door(initial_noise=-noise)).frames[0], video.frames) > 1


def test_layout_order_is_the_block_of_each_reference(model):
    references = [picture((250, 20, 20)), GREEN, picture((20, 20, 250))]
    result = model.generate(["a fish"], [references], layout_order=[[1, 2, 0]])
    columns = result.canvas[0].reshape(8, 3, 4, 3).mean(axis=(0, 2))
    assert columns.argmax(axis=1).tolist() == [2, 0, 1]  # the blue one first
    drawn = model.generate(["a fish"], [references], layout_order=[None])
    assert drawn.canvas[0].reshape(8, 3, 4, 3).mean(axis=(0, 2)).argmax(axis=1).tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": []}, "references has 1 entries for 0 prompts"),
        ({"references": [[], []]}, "references has 2 entries for 1 prompts"),
        ({"subjects": []}, "subjects has 0 entries for 1 prompts"),
        ({"layout_order": [[0, 1], [1, 0]]}, "layout_order has 2 entries for 1 prompts"),
        ({"layout_order": [[0, 2]]}, "order=(0, None, 1) is for 3 cells; 2 references have 2"),
        ({"layout_order": [[1, 1]]}, "layout_order has (1, 1) for 2 references; must hold a block of its own for each"),
        ({"layout_order": [[0]]}, "layout_order has (0,) for 2 references"),
        ({"prompts": [], "references": [], "subjects": None}, "the batch is empty"),
        ({"initial_noise": np.zeros((1, 16, 3, 4, 6))}, "shape (1, 16, 3, 4, 6), expected (1, 3, 4, 6, 16)"),
        ({"initial_noise": np.zeros((2, 3, 4, 6, 16))}, "shape (2, 3, 4, 6, 16), expected (1, 3, 4, 6, 16)"),
        ({"num_frames": 6}, "num_frames=6 must be 2n + 1"),
        ({"mask_mode": "none"}, "mask_mode='none' is unknown"),
    ],
)
def test_what_the_door_cannot_take_is_refused(model, changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        model.generate(**door(**changes))


def test_the_door_passes_every_option_on(model, monkeypatch):
    passed = {}
    monkeypatch.setattr(pipeline, "generate", lambda model, requests, **options: passed.update(options))
    sampling = dataclasses.asdict(CONFIG.sampling)
    model.generate(**door(**sampling, initial_noise="noise", on_step="on_step", return_trajectory="trajectory"))
    assert passed == sampling | {"initial_noise": "noise", "on_step": "on_step", "return_trajectory": "trajectory"}
    passed.clear()
    model.generate(**door())
    assert passed == {"initial_noise": None, "on_step": None, "return_trajectory": False}


def test_noise_is_unit_normal_and_does_not_depend_on_the_batch(model):
    config = pipeline.with_sampling(model.config, height=64, width=64, num_frames=17)
    noise = pipeline.draw_noise(config, request())
    assert noise.shape == (9, 32, 32, 16)
    assert abs(noise.mean()) < 0.02
    assert abs(noise.std() - 1) < 0.02
    # The platform's generator must not matter, nor must a flag that changes how bits are laid out.
    with jax.threefry_partitionable(False), jax.default_prng_impl("rbg"):
        np.testing.assert_array_equal(pipeline.draw_noise(config, request()), noise)
    assert np.abs(np.corrcoef(noise.ravel(), pipeline.draw_noise(config, request(key="two")).ravel())[0, 1]) < 0.02


def test_order_of_the_canvas_is_drawn_from_seed_and_key_or_pinned(model):
    config = pipeline.with_sampling(model.config, layout="v2")
    cells = {
        key: pipeline.prepare(config, model.tokenizer, request(key=key)).canvas.cells for key in map(str, range(8))
    }
    assert set(cells.values()) == {((0, 0, 6, 8), (6, 0, 12, 8)), ((6, 0, 12, 8), (0, 0, 6, 8))}
    pinned = pipeline.prepare(config, model.tokenizer, request(order="1,0"))
    assert pinned.canvas.cells == ((6, 0, 12, 8), (0, 0, 6, 8))


def num_matmuls(function, *arguments, **keywords):
    return function.lower(*arguments, **keywords).as_text().count("stablehlo.dot_general")


def test_guidance_of_1_evaluates_the_dit_once_per_step(model):
    case = pipeline.prepare(CONFIG, model.tokenizer, request())
    arrays, noise = pipeline.stack_cases([case]), pipeline.draw_noise(CONFIG, request())[None]
    text = (case.token_ids[None], case.attention_mask[None])

    def count(guidance_scale):
        config = pipeline.with_sampling(CONFIG, guidance_scale=guidance_scale)
        return num_matmuls(
            pipeline._sample, model.params, arrays, text, noise, config=config, on_step=None, return_trajectory=False
        )

    def encode(params):
        return pipeline.encode_cases(pipeline.encoders(CONFIG, params), arrays, CONFIG.sampling.num_frames)

    def velocity(params, conditioning):
        return pipeline.velocity_fn(CONFIG, params["dit"], conditioning)(noise, jnp.ones(1))

    plain = jax.eval_shape(encode, model.params).replace(subject_tokens=None)
    dit = num_matmuls(jax.jit(velocity), model.params, plain)
    encoder = num_matmuls(jax.jit(pipeline.encoders(CONFIG, model.params).text), *text)
    assert count(2.0) - count(1.0) == dit + encoder


def test_without_guidance_the_negative_prompt_does_nothing_and_steps_are_reported_in_order(model, video):
    steps = []
    plain = {"guidance_scale": 1.0, "solver": "euler", "num_inference_steps": 4, "on_step": steps.append}
    first = generate(model, [request()], **plain)
    jax.effects_barrier()
    assert steps == [0, 1, 2, 3]
    second = generate(model, [request()], negative_prompt="a meadow", **plain)
    np.testing.assert_array_equal(first.frames, second.frames)
    guided = generate(model, [request()], negative_prompt="a meadow")
    assert difference(guided.frames[0], video.frames) > 1


def test_prompts_of_any_length_and_any_negative_prompt_share_one_program(model, video):
    before = pipeline._sample._cache_size()
    generate(model, [request(prompt="the red apple and the blue fish")], negative_prompt="")
    assert pipeline._sample._cache_size() == before


def test_parameters_are_loaded_as_stored_and_computed_with_in_float32(model):
    assert {leaf.dtype for leaf in jax.tree.leaves(model.params)} == {jnp.bfloat16.dtype}
    # The tiny model runs in float32. A cast from bfloat16 is exact, so casting before or while computing is the same,
    # unless some layer computes in the dtype of its parameters.
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), model.params)
    case = pipeline.prepare(CONFIG, model.tokenizer, request())
    arrays = pipeline.stack_cases([case])
    noise = pipeline.draw_noise(CONFIG, request())[None]

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
    taken = []
    for name in ("encode", "encode_stream", "decode", "decode_stream"):
        monkeypatch.setattr(vae, name, lambda *args, name=name: taken.append(name))
    for height, width in ((48, 72), (480, 832)):
        pipeline.decode(CONFIG, None, jnp.zeros((1, 5, height // 2, width // 2, 16)))
        pipeline.encoders(CONFIG, model.params).frames(jnp.zeros((1, 9, height, width, 3)))
    assert taken == ["decode", "encode", "decode_stream", "encode_stream"]


def test_text_to_video_without_references_runs_and_refuses_them(model):
    config = dataclasses.replace(
        CONFIG,
        dit=dataclasses.replace(CONFIG.dit, in_channels=16, image_dim=None),
        image_encoder=None,
        subject_alpha=0.0,
        drop_frames=0,
    )
    text_to_video = pipeline.Model(config, random_params(config), model.tokenizer)
    result = generate(text_to_video, [Request("a fish", seed=1), Request("a red apple", seed=1)])
    assert result.frames.shape == (2, 5, 8, 12, 3)
    assert difference(*result.frames) > 1
    with pytest.raises(ValueError, match="2 reference images given, but this is a text-to-video model"):
        generate(text_to_video, [request()])


def test_a_mesh_gives_the_same_videos_and_rounds_the_batch_up(model, video):
    on_mesh = dataclasses.replace(model, mesh=make_mesh("data=2,fsdp=2,tensor=2"))
    result = generate(on_mesh, [request()])
    assert [len(values) for values in (result.frames, result.latents, result.cases)] == [1, 1, 1]
    assert difference(result.frames[0], video.frames) <= 1


def test_a_model_can_be_loaded_onto_a_mesh(model, model_folder):  # noqa: F811
    mesh = make_mesh("fsdp=-1")
    sharded = pipeline.load(model_folder, mesh)
    assert sharded.mesh is mesh
    kernel = sharded.params["dit"]["blocks"]["feed_forward"]["up"]["kernel"]
    assert kernel.sharding.shard_shape(kernel.shape) == (2, 3, 32)  # dim 24 in 8 parts
    jax.tree.map(np.testing.assert_array_equal, sharded.params, model.params)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"height": 10}, r"height=10 must be a positive multiple of 4"),
        ({"width": 0}, r"width=0 must be a positive multiple of 4"),
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


def test_a_tokenizer_of_more_tokens_than_the_text_encoder_has_is_refused(model_folder, tmp_path):  # noqa: F811
    shutil.copytree(model_folder, tmp_path / "model")
    text_encoder = dataclasses.replace(CONFIG.text_encoder, vocab_size=9)
    (tmp_path / "model" / "config.json").write_text(dataclasses.replace(CONFIG, text_encoder=text_encoder).to_json())
    with pytest.raises(ValueError, match=r"tokens, more than text_encoder.vocab_size=9"):
        pipeline.load(tmp_path / "model")


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
