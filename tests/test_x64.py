"""With JAX_ENABLE_X64=1 the same seed gives the same video and the same training run: nothing leaves its dtype to JAX."""

import ast
import collections
import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import magref_jax
import train
from magref_jax import pipeline
from magref_jax.diffusion.flow import loss_weight, sample_sigmas
from magref_jax.diffusion.step_cache import StepPlan
from magref_jax.models.adapters import LoraConfig, init_lora
from magref_jax.sharding import make_mesh
from magref_jax.training.config import ObjectiveConfig, OptimizerConfig
from magref_jax.training.objective import Batch, Null, flow_matching, reconstruction
from magref_jax.training.optimizer import make_optimizer
from magref_jax.training.step import init_state, train_step
from tests.tiny_model import CONFIG, model_folder, picture, write_model  # noqa: F401
from tests.training.tiny_run import MODEL, tiny_run

ROOT = pathlib.Path(magref_jax.__file__).parents[1]
WIDE = {"float64", "complex128"}

# What draws numbers of a dtype of its own, and at which place among its arguments the dtype is.
DRAWS = {
    "ball": 4, "beta": 4, "bits": 2, "cauchy": 2, "dirichlet": 3, "exponential": 2, "gamma": 3, "gumbel": 2, "laplace": 2,
    "logistic": 2, "multivariate_normal": 4, "normal": 2, "orthogonal": 3, "poisson": 3, "rademacher": 2, "randint": 4,
    "t": 3, "truncated_normal": 4, "uniform": 2,
}  # fmt: skip


def sources() -> list[pathlib.Path]:
    return [*(ROOT / "magref_jax").rglob("*.py"), *(ROOT / "configs").glob("*.py"), *ROOT.glob("*.py")]


def test_every_random_draw_names_its_dtype():
    drawn, unnamed = 0, []
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not ast.unparse(node.func).startswith("jax.random."):
                continue
            place = DRAWS.get(ast.unparse(node.func).removeprefix("jax.random."))
            if place is None:
                continue
            drawn += 1
            named = len(node.args) > place or any(keyword.arg == "dtype" for keyword in node.keywords)
            unnamed += [] if named else [f"{path.name}:{node.lineno}: {ast.unparse(node)}"]
    assert drawn >= 7
    assert unnamed == []
    # None goes by another name.
    for path in sources():
        assert not {"from jax.random import", "import jax.random"} & set(path.read_text(encoding="utf-8").splitlines())


def wide_values(jaxpr: jax.extend.core.Jaxpr) -> collections.Counter:
    """The operations of a program that give 64-bit floats, those of programs inside it too, but for constants."""
    found = collections.Counter()
    for equation in jaxpr.eqns:
        found.update(
            f"{equation.primitive.name} {variable.aval}"
            for variable in equation.outvars
            if str(getattr(variable.aval, "dtype", "")) in WIDE and not getattr(variable.aval, "weak_type", False)
            # A table of constants that is rounded once is what it would have been at once.
            if equation.primitive.name not in ("broadcast_in_dim", "scatter")
        )
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                found.update(wide_values(inner))
    return found


def check_narrow(traced: jax.stages.Traced, but: frozenset[str] = frozenset()) -> None:
    assert wide_values(traced.jaxpr.jaxpr).keys() - but == set()
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(traced.out_info)} & {*WIDE, "int64", "uint64"} == set()


def test_the_search_finds_64_bits_wherever_they_are():
    table = np.ones(2)

    def with_wide(x):
        return jax.lax.fori_loop(0, 3, lambda _, y: jnp.where(y > 0, y * table, y).astype(jnp.float32), x)

    with jax.enable_x64(True):
        assert wide_values(jax.jit(with_wide).trace(jnp.ones(2, jnp.float32)).jaxpr.jaxpr)


@pytest.mark.parametrize("streamed", [False, True])
def test_no_program_of_sampling_computes_in_64_bits(model_folder, monkeypatch, streamed):  # noqa: F811
    if streamed:
        monkeypatch.setattr(pipeline, "STREAM_PIXELS", 1)
    # So long a text that its padding is collapsed; all branches of guidance; a plan.
    dit = dataclasses.replace(CONFIG.dit, text_len=160)
    config = pipeline.with_sampling(
        dataclasses.replace(CONFIG, dit=dit, fps=1 + streamed), reference_guidance_scale=3.0
    )
    request = pipeline.Request("the red apple", [picture((250, 20, 20))], ["red apple"], seed=1)
    tokenizer = pipeline.load_tokenizer(model_folder)
    plan = StepPlan((True, False, True), ((1.0, 0.0),) * 3)
    for program in (pipeline._encode, pipeline._advance, pipeline._decode):
        program.clear_cache()  # whether a clip is streamed is asked when a program is traced
    with jax.enable_x64(True):
        params = pipeline.abstract_params(config)
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
        _, arrays, noise = pipeline._prepare_batch(config, tokenizer, [request], None, None, 1, None)
        static = pipeline._static(config, None)
        encode = pipeline._encode.trace(params, arrays, noise, **static["encode"])
        check_narrow(encode)
        inputs, state, _ = encode.out_info
        for solver in ("unipc",) if streamed else ("unipc", "dpm++", "euler"):
            static = pipeline._static(pipeline.with_sampling(config, solver=solver), None)
            state = jax.eval_shape(lambda: pipeline.start(noise, solver))  # noqa: B023
            steps = pipeline.plan_arrays(plan)
            advance = pipeline._advance.trace(params["dit"], inputs, state, np.int32(1), steps, **static["advance"])
            check_narrow(advance)
        check_narrow(pipeline._decode.trace(params["vae"], state.latents, **static["decode"]))


def test_what_is_drawn_does_not_depend_on_it():
    def draw():
        key = jax.random.key(7)
        request = pipeline.Request("a fish", seed=3, key="0")
        return {
            "noise": pipeline.draw_noise(CONFIG, request),
            "adapters": init_lora(CONFIG.dit, LoraConfig(rank=2), key),
            "sigmas": [sample_sigmas(key, (5,), distribution=name) for name in ("uniform", "logit_normal")],
            "weights": loss_weight(jnp.asarray([0.25, 0.5], jnp.float32), "bsmntw", flow_shift=3.0),
        }

    narrow = draw()
    with jax.enable_x64(True):
        wide = draw()
    for (path, expected), (_, found) in zip(
        jax.tree.leaves_with_path(narrow), jax.tree.leaves_with_path(wide), strict=True
    ):
        name = jax.tree_util.keystr(path)
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape), name
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7, err_msg=name)


def test_a_video_does_not_depend_on_it(model_folder):  # noqa: F811
    model = pipeline.load(model_folder)
    request = pipeline.Request("the red apple", [picture((250, 20, 20))], ["red apple"], seed=1)
    narrow = pipeline.generate(model, [request], num_inference_steps=2)
    with jax.enable_x64(True):
        wide = pipeline.generate(model, [request], num_inference_steps=2)
    assert wide.latents.dtype == np.float32
    np.testing.assert_allclose(wide.latents, narrow.latents, rtol=0, atol=1e-6)
    assert np.abs(wide.frames.astype(int) - narrow.frames).max() <= 1


def test_no_program_of_training_computes_in_64_bits(model_folder):  # noqa: F811
    config, optimizer = MODEL, make_optimizer(OptimizerConfig(warmup_steps=2, cycle_steps=(3,)))
    request = pipeline.Request("the red apple", [picture((250, 20, 20))], ["red apple"], seed=1)
    tokenizer = pipeline.load_tokenizer(model_folder)
    objective = ObjectiveConfig(weighting="bsmntw", subject_weight=2.0)

    def first(tree):
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), tree)

    with jax.enable_x64(True):
        key = jax.random.key(0)
        check_narrow(jax.jit(functools.partial(pipeline.init_params, config)).trace(key))
        params = pipeline.abstract_params(config)
        _, arrays, noise = pipeline._prepare_batch(config, tokenizer, [request], None, None, 1, None)
        conditioning = (
            pipeline._encode.trace(params, arrays, noise, **pipeline._static(config, None)["encode"])
            .out_info[0]
            .conditioning
        )
        latents = jax.ShapeDtypeStruct((2, *noise.shape[1:]), jnp.float32)  # two branches of guidance
        cells = jax.ShapeDtypeStruct(latents.shape[:-1], jnp.float32)
        batch = Batch(latents, cells, conditioning, tuple(range(latents.shape[1])))
        null = Null(
            first(conditioning.text_embeddings),
            first(conditioning.reference_latents),
            first(conditioning.image_embeddings),
        )
        frames = jax.ShapeDtypeStruct((2, 3, 8, 8, 3), jnp.float32)
        reconstruct = jax.jit(functools.partial(reconstruction, config.vae, 1e-4))
        check_narrow(reconstruct.trace(params["vae"], frames, jax.random.split(key, 2)))
        adapters = jax.eval_shape(functools.partial(init_lora, config.dit, LoraConfig(rank=2)), key)

        def full(params, null, batch, keys):
            return flow_matching(config, objective, params, None, null, batch, keys)

        def low_rank(lora, frozen, batch, keys):
            return flow_matching(config, objective, frozen[0], lora, frozen[1], batch, keys)

        for loss, trained, frozen in ((full, params["dit"], null), (low_rank, adapters, (params["dit"], null))):
            state = jax.eval_shape(lambda params: init_state(params, optimizer, key), trained)
            step = jax.jit(functools.partial(train_step, loss, optimizer, 0.5, 1))
            traced = step.trace(state, frozen, batch, jax.ShapeDtypeStruct((), jnp.int32))
            # What optax corrects the moments of AdamW by, and rounds before it does.
            check_narrow(traced, but=frozenset({"pow float64[]", "sub float64[]"}))
            assert jax.tree.map(lambda leaf: leaf.dtype, traced.out_info[0]) == jax.tree.map(
                lambda leaf: leaf.dtype, state
            )


@pytest.mark.slow
def test_a_training_run_does_not_depend_on_it_and_goes_on_under_it(tmp_path):
    folder = write_model(tmp_path / "model", MODEL, dtype=None)
    config = tiny_run(folder, start="random")
    mesh = make_mesh("", jax.devices()[:1])

    def run(name: str, num_steps: int = 2):
        state = train.train(dataclasses.replace(config, num_steps=num_steps), tmp_path / name, mesh)
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return state, [json.loads(line)["loss"] for line in lines if "loss" in json.loads(line)]

    narrow, losses = run("narrow", 3)
    run("mixed", 2)
    with jax.enable_x64(True):
        wide, found = run("mixed", 3)
    assert len(losses) == 3
    np.testing.assert_allclose(found, losses, rtol=1e-6)
    for expected, leaf in zip(jax.tree.leaves(narrow), jax.tree.leaves(wide), strict=True):
        assert leaf.dtype == expected.dtype
    for expected, leaf in zip(jax.tree.leaves(narrow.params), jax.tree.leaves(wide.params), strict=True):
        np.testing.assert_allclose(leaf, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("seed", [-1, 2**32, 3.0, True, None])
def test_a_seed_of_a_run_is_one_that_jax_keeps_whole(tmp_path, seed):
    with pytest.raises(ValueError, match="^seed=.* must be"):
        dataclasses.replace(tiny_run(tmp_path), seed=seed)
