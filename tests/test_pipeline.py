"""End to end on a tiny random model: what a video depends on, what it does not, and what is refused."""

import dataclasses
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from magref_jax import pipeline
from magref_jax.checkpoint import save_model
from magref_jax.config import with_dtype
from magref_jax.diffusion.step_cache import StepPlan
from magref_jax.models import vae
from magref_jax.models.dit import DiT, SubjectInjection
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


def cache_sizes():
    return [program._cache_size() for program in (pipeline._encode, pipeline._advance, pipeline._decode)]


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
    before = cache_sizes()
    result = model.generate(**door())
    assert cache_sizes() == before
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
    others = {"initial_noise": "noise", "on_step": "on_step", "return_trajectory": "trajectory", "step_plan": "plan"}
    model.generate(**door(**sampling, **others))
    assert passed == sampling | others
    passed.clear()
    model.generate(**door())
    assert passed == {"initial_noise": None, "on_step": None, "return_trajectory": False, "step_plan": None}


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


def test_guidance_is_one_evaluation_of_twice_the_batch_and_none_at_a_scale_of_1(model, monkeypatch):
    batches = []
    dit = pipeline.DiT.__call__

    def spy(self, latents, timesteps, *args, **kwargs):
        batches.append(len(latents))
        return dit(self, latents, timesteps, *args, **kwargs)

    monkeypatch.setattr(pipeline.DiT, "__call__", spy)
    for scales, rows in (((2.5, 1.0), 6), ((1.0, 1.0), 3), ((0.0, 1.0), 3), ((2.5, 2.5), 6), ((2.5, 2.0), 9)):
        options = dict(zip(("guidance_scale", "reference_guidance_scale"), scales, strict=True))
        config = pipeline.with_sampling(CONFIG, **options)
        pipeline.lower(config, model.tokenizer, model.params, request(), batch_size=3)
        found, batches[:] = set(batches), []
        assert found == {rows}


def test_the_blank_branch_is_what_no_prompt_and_no_references_give(model):
    def encoded(of_request, branch):
        _, arrays, noise = pipeline._prepare_batch(CONFIG, model.tokenizer, [of_request], None, None, None, None)
        inputs, _, finite = pipeline._encode(model.params, arrays, noise, config=CONFIG, branches=(branch,), mesh=None)
        assert all(map(np.all, finite.values()))
        return inputs.conditioning

    blank = encoded(request(), "blank")
    nothing = encoded(
        dataclasses.replace(request(), prompt="blue", images=(), subjects=()), "conditional"
    )  # the negative
    for name in ("text_embeddings", "image_embeddings", "reference_latents", "region_mask"):
        np.testing.assert_allclose(getattr(blank, name), getattr(nothing, name), atol=1e-5, err_msg=name)
    assert not blank.subject_tokens.any()
    assert not blank.subject_regions.any()


def test_reference_guidance_changes_the_video(model, video):
    guided = generate(model, [request()], reference_guidance_scale=CONFIG.sampling.guidance_scale)
    assert difference(guided.frames[0], video.frames) > 1


def test_without_guidance_the_negative_prompt_does_nothing_and_steps_are_reported_in_order(model, video):
    steps = []
    plain = {"guidance_scale": 1.0, "solver": "euler", "num_inference_steps": 4, "on_step": steps.append}
    first = generate(model, [request()], **plain)
    assert steps == [0, 1, 2, 3]
    second = generate(model, [request()], negative_prompt="a meadow", **plain)
    np.testing.assert_array_equal(first.frames, second.frames)
    guided = generate(model, [request()], negative_prompt="a meadow")
    assert difference(guided.frames[0], video.frames) > 1


def test_other_sampling_options_compile_the_loop_alone(model, video):
    before = cache_sizes()
    generate(model, [request()], num_inference_steps=2, flow_shift=5.0, guidance_scale=4.0)
    assert [after - size for after, size in zip(cache_sizes(), before, strict=True)] == [0, 1, 0]


def test_a_request_may_have_a_negative_prompt_of_its_own(model, video):
    own = dataclasses.replace(request(), negative_prompt="a meadow")
    both = generate(model, [own, request()])
    expected = generate(model, [request()], negative_prompt="a meadow")
    assert difference(both.frames[0], expected.frames[0]) <= 1
    assert difference(both.frames[1], video.frames) <= 1


def test_twelve_cases_of_one_size_compile_each_program_once(model):
    words = PROMPT.split()
    requests = [request(" ".join(words[: 13 - i]), key=str(i), subjects=()) for i in range(12)]
    before = cache_sizes()
    for i in range(0, 12, 5):
        result = generate(model, requests[i : i + 5], batch_size=5, negative_prompt=" ".join(words[:i]), width=16)
        assert len(result.frames) == min(5, 12 - i)
    assert cache_sizes() == [size + 1 for size in before]


@pytest.fixture(scope="module")
def long_text(model):
    """A model that reads 160 text tokens, so that there is padding to collapse."""
    config = dataclasses.replace(CONFIG, dit=dataclasses.replace(CONFIG.dit, text_len=160))
    return dataclasses.replace(model, config=config)


def test_a_padding_token_that_counts_for_all_gives_the_same_video(long_text):
    counts = [pipeline.count_text_tokens(long_text.config, [length]) for length in (0, 63, 64, 127, 128, 160)]
    assert counts == [64, 64, 128, 128, 160, 160]
    every = generate(long_text, [request()], text_tokens=160, guidance_scale=5.0)
    collapsed = generate(long_text, [request()], guidance_scale=5.0)
    np.testing.assert_allclose(collapsed.latents, every.latents, atol=1e-5)
    # It matters how often it counts: 96 padding tokens fewer are another model.
    fewer = dataclasses.replace(CONFIG, dit=dataclasses.replace(CONFIG.dit, text_len=64))
    other = generate(dataclasses.replace(long_text, config=fewer), [request()], guidance_scale=5.0)
    assert np.abs(other.latents - every.latents).max() > 1e-3
    with pytest.raises(ValueError, match="text_tokens=12 must be 64 to 160"):
        generate(long_text, [request()], text_tokens=12)


def test_context_made_once_is_that_of_every_step(model):
    case = pipeline.prepare(CONFIG, model.tokenizer, request())
    noise = pipeline.draw_noise(CONFIG, request())[None]

    @jax.jit
    def both(params, arrays):
        encoded = pipeline.encode_cases(pipeline.encoders(CONFIG, params), arrays, CONFIG.sampling.num_frames)
        embeddings = encoded.text_embeddings, encoded.image_embeddings
        context = pipeline.encode_context(CONFIG.dit, params["dit"], *embeddings)
        functions = [pipeline.velocity_fn(CONFIG, params["dit"], encoded, context=seen) for seen in (None, context)]
        return [function(noise, jnp.full((1,), 700.0)) for function in functions]

    each_step, once = both(model.params, pipeline.stack_cases([case]))
    np.testing.assert_allclose(once, each_step, atol=1e-5)


@pytest.mark.parametrize(
    ("mesh", "batch_size"),
    [(None, 1), ("data=2", 3), *(pytest.param(*pair, marks=pytest.mark.slow) for pair in [(None, 3), ("data=2", 1)])],
)
def test_meshes_and_batch_sizes_change_rounding_alone(model, mesh, batch_size):
    requests = [request(key=str(i), seed=i) for i in range(3)]
    placed = dataclasses.replace(model, mesh=mesh and make_mesh(mesh, jax.devices()[:2]))
    found = [
        generate(placed, requests[i : i + batch_size], batch_size=batch_size).latents for i in range(0, 3, batch_size)
    ]
    alone = [generate(model, [one]).latents for one in requests]
    np.testing.assert_allclose(np.concatenate(found), np.concatenate(alone), atol=1e-5)


@pytest.mark.slow
def test_every_mesh_and_batch_size_change_rounding_alone(model):
    requests = [request(key=str(i), seed=i) for i in range(8)]
    noise = np.stack([pipeline.draw_noise(CONFIG, one) for one in requests])
    alone = np.concatenate([generate(model, [one]).latents for one in requests])
    for devices, spec in ((1, ""), (2, "data=2"), (4, "data=2,fsdp=2"), (8, "fsdp=-1"), (8, "data=2,fsdp=2,tensor=2")):
        placed = dataclasses.replace(model, mesh=make_mesh(spec, jax.devices()[:devices]))
        for batch_size in (1, 3, 8):
            batches = [requests[i : i + batch_size] for i in range(0, 8, batch_size)]
            found = np.concatenate([generate(placed, batch, batch_size=batch_size).latents for batch in batches])
            np.testing.assert_allclose(found, alone, atol=1e-5, err_msg=f"{spec} {batch_size}")
            again = np.stack([pipeline.draw_noise(placed.config, one) for batch in batches for one in batch])
            np.testing.assert_array_equal(again, noise)


def test_a_case_that_fails_is_named_and_leaves_the_others_alone(model):
    requests = [request(key=str(i), seed=i) for i in range(3)]
    noise = np.stack([pipeline.draw_noise(CONFIG, one) for one in requests])
    good = generate(model, requests, initial_noise=noise)
    assert good.failures == (None,) * 3
    noise[1, 0, 0, 0, 0] = np.inf
    result = generate(model, requests, initial_noise=noise)
    assert result.failures == (None, "the latents are not finite after step 1 of 3", None)
    for row in (0, 2):
        np.testing.assert_array_equal(result.frames[row], good.frames[row])
    assert [video.failure for video in result] == list(result.failures)


@pytest.mark.parametrize(
    ("network", "path", "message", "steps"),
    [
        ("text_encoder", ("norm", "scale"), "the text embeddings are not finite", 1),
        ("image_encoder", ("input_norm", "scale"), "the image embeddings are not finite", 1),
        ("vae", ("encoder", "conv_in", "bias"), "the reference latents are not finite", 1),
        ("dit", ("head", "modulation"), "the latents are not finite after step 1 of 3", 1),
        ("vae", ("decoder", "conv_out", "bias"), "the decoded frames are not finite", 3),
    ],
)
def test_the_first_part_that_is_not_finite_is_named_and_work_in_vain_is_not_done(model, network, path, message, steps):
    params = jax.tree.map(lambda leaf: leaf, model.params)
    *folders, name = path
    tree = params[network]
    for folder in folders:
        tree = tree[folder]
    tree[name] = tree[name].at[0].set(jnp.nan)
    reported = []
    result = generate(dataclasses.replace(model, params=params), [request()], on_step=reported.append)
    assert result.failures == (message,)
    # The step after the one that failed was on its way already.
    assert len(reported) == steps


def test_a_plan_skips_evaluations_without_another_compilation(model, video):
    plans = [
        StepPlan((True, False, True), ((1.0, 0.0), (1.0, 0.0), (1.0, 0.0))),
        StepPlan((True, True, False), ((1.0, 0.0), (1.0, 0.0), (1.5, -0.5))),
    ]
    results = [generate(model, [request()], step_plan=plan, return_trajectory=True) for plan in plans]
    before = cache_sizes()
    generate(model, [request()], step_plan=StepPlan((True, False, False), ((1.0, 0.0),) * 3))
    assert cache_sizes() == before
    held, extended = (result.velocities[:, 0] for result in results)
    np.testing.assert_array_equal(held[1], held[0])
    np.testing.assert_allclose(extended[2], 1.5 * extended[1] - 0.5 * extended[0], atol=1e-5)
    assert difference(results[0].frames[0], video.frames) > 1
    full = generate(model, [request()], step_plan=StepPlan.full(3))
    np.testing.assert_array_equal(full.frames[0], video.frames)


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


def test_a_folder_that_computes_in_bfloat16_computes_in_float32_when_asked_to(model, model_folder, tmp_path):  # noqa: F811
    shutil.copytree(model_folder, tmp_path / "model")
    narrow = with_dtype(CONFIG, "bfloat16")
    save_model(tmp_path / "model", narrow, {})
    exact = pipeline.load(tmp_path / "model", dtype="float32")
    expected, found = generate(model, [request()]), generate(exact, [request()])
    assert expected.latents.std() > 0.1
    np.testing.assert_array_equal(found.latents, expected.latents)
    np.testing.assert_array_equal(found.frames, expected.frames)
    assert pipeline.load(tmp_path / "model").config == narrow
    with pytest.raises(ValueError, match="dtype='float16' is unknown; choose from float32, bfloat16"):
        pipeline.load(tmp_path / "model", dtype="float16")


def test_large_clips_stream_through_the_vae(model, monkeypatch):
    taken = []
    for name in ("encode", "encode_stream", "decode", "decode_stream"):
        monkeypatch.setattr(vae, name, lambda *args, name=name: taken.append(name))
    for height, width in ((48, 72), (480, 832)):
        pipeline.decode(CONFIG, None, jnp.zeros((1, 5, height // 2, width // 2, 16)))
        pipeline.encoders(CONFIG, model.params).frames(jnp.zeros((1, 9, height, width, 3)))
    assert taken == ["decode", "encode", "decode_stream", "encode_stream"]


@pytest.fixture
def token_model(model):
    dit = dataclasses.replace(CONFIG.dit, in_channels=16)
    config = dataclasses.replace(CONFIG, dit=dit, reference_concat="token", drop_frames=0)
    return dataclasses.replace(model, config=config, params=model.params | {"dit": random_params(config)["dit"]})


def test_a_canvas_of_tokens_is_a_latent_frame_more_that_nobody_gets(token_model):
    config, params = token_model.config, token_model.params
    arrays = pipeline.stack_cases([pipeline.prepare(config, token_model.tokenizer, request())])
    noise = pipeline.draw_noise(config, request())[None]
    conditioning = pipeline.encode_cases(pipeline.encoders(config, params), arrays, config.sampling.num_frames)
    found = pipeline.velocity_fn(config, params["dit"], conditioning)(noise, jnp.full((1,), 500.0))
    assert found.shape == noise.shape
    # The transformer alone, with a canvas in front that is as clean as time 0 says.
    frames = np.concatenate([conditioning.reference_latents[:, :1], noise], axis=1)
    whole = DiT(config.dit).apply(
        {"params": params["dit"]},
        frames,
        jnp.array([[0.0, 500.0, 500.0, 500.0]]),
        conditioning.text_embeddings,
        conditioning.image_embeddings,
        subjects=SubjectInjection(conditioning.subject_tokens, conditioning.subject_regions),
        subject_alpha=config.subject_alpha,
    )
    np.testing.assert_allclose(found, whole[:, 1:], atol=1e-5)
    assert pipeline.takes_references(config)


def test_a_canvas_of_tokens_is_seen_by_the_sampler(token_model):
    (made,) = generate(token_model, [request()])
    assert made.frames.shape == (CONFIG.sampling.num_frames, 8, 12, 3)
    (other,) = generate(token_model, [dataclasses.replace(request(), images=[GREEN, GREEN])])
    assert difference(made.frames, other.frames) > 1


def test_a_canvas_of_tokens_leaves_no_room_for_channels():
    with pytest.raises(ValueError, match="reference_concat='token' .*in_channels=36 must be .*latent_channels=16"):
        dataclasses.replace(CONFIG, reference_concat="token")


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
    with pytest.raises(ValueError, match="reference_guidance_scale=2.0 must be 1: this is a text-to-video model"):
        generate(text_to_video, [Request("a fish")], reference_guidance_scale=2.0)


def test_a_mesh_gives_the_same_videos_and_rounds_the_batch_up(model, video):
    on_mesh = dataclasses.replace(model, mesh=make_mesh("data=2,fsdp=2,tensor=2"))
    result = generate(on_mesh, [request()])
    assert [len(values) for values in (result.frames, result.latents, result.cases, result.failures)] == [1] * 4
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
        ({"reference_guidance_scale": float("inf")}, r"reference_guidance_scale=inf must be a finite"),
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
    ("damage", "error", "message"),
    [
        (lambda folder: shutil.rmtree(folder), FileNotFoundError, "model does not exist; a model folder holds"),
        (lambda folder: (folder / "config.json").unlink(), FileNotFoundError, "it has no config.json"),
        (lambda folder: cut(folder / "config.json"), ValueError, "config.json: is not JSON: "),
        (lambda folder: (folder / "config.json").write_text("null"), ValueError, "config.json: config=None must be"),
        (lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe"), ValueError, "config.json: 'utf-8' codec"),
        (lambda folder: shutil.rmtree(folder / "tokenizer"), FileNotFoundError, "tokenizer does not exist; expected"),
        (
            lambda folder: cut(folder / "tokenizer/tokenizer.json"),
            ValueError,
            "tokenizer holds no tokenizer that can be",
        ),
        (lambda folder: (folder / "tokenizer/tokenizer.json").unlink(), ValueError, "tokenizer holds no tokenizer"),
        (lambda folder: (folder / "MANIFEST.json").unlink(), FileNotFoundError, "it has no MANIFEST.json"),
        (lambda folder: cut(folder / "MANIFEST.json"), ValueError, "MANIFEST.json is damaged"),
        (lambda folder: shutil.rmtree(folder / "dit"), ValueError, "is missing"),
    ],
    ids=lambda value: value if isinstance(value, str) else getattr(value, "__name__", ""),
)
def test_a_folder_that_is_not_whole_is_refused_in_a_sentence(model_folder, tmp_path, damage, error, message):  # noqa: F811
    shutil.copytree(model_folder, tmp_path / "model")
    damage(tmp_path / "model")
    with pytest.raises(error, match=re.escape(message)) as refused:
        pipeline.load(tmp_path / "model")
    assert str(tmp_path / "model") in str(refused.value)
    assert "\n" not in str(refused.value)
    assert "Errno" not in str(refused.value)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_an_import_says_and_changes_nothing_and_needs_no_torch(model_folder):  # noqa: F811
    script = f"""
import os, pathlib, sys
sys.modules["torch"] = None  # as if it were not installed
import jax
flags = dict(jax.config.values)
import magref_jax.pipeline
assert "transformers" not in sys.modules
assert dict(jax.config.values) == flags
assert not jax._src.xla_bridge.backends_are_initialized()
magref_jax.pipeline.load_tokenizer(pathlib.Path({str(model_folder)!r}))
assert "TRANSFORMERS_NO_ADVISORY_WARNINGS" not in os.environ
import transformers
assert transformers.logging.get_verbosity() == transformers.logging.WARNING
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


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
