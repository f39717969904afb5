"""Model folders and training checkpoints.

A model folder is what `sample.py` reads and what training and conversion write:

    config.json                                   ModelConfig
    dit/  vae/  text_encoder/  image_encoder/     parameters (orbax); a text-to-video model has no image_encoder
    tokenizer/                                    files for transformers.AutoTokenizer
    MANIFEST.json                                 sha256 of every other file
"""

import hashlib
import json
import pathlib
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from magref_jax.config import ModelConfig, load_model_config

Params = Any

NETWORKS = ("dit", "vae", "text_encoder", "image_encoder")
MANIFEST = "MANIFEST.json"


def save_params(folder: pathlib.Path, params: Params, dtype: str | None = None) -> None:
    """Writes one network's parameters, cast to `dtype` if given; an existing folder is replaced as a whole."""
    if dtype is not None:
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.dtype(dtype)), params)
    folder = folder.absolute()
    temporary = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(temporary, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(temporary, params)
    # It names the folder of the machine that wrote it, and nothing reads it on a file system that renames atomically.
    (temporary / "commit_success.txt").unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def restore_params(folder: pathlib.Path, abstract_params: Params) -> Params:
    """Reads parameters in the dtype they are stored in, into the shardings of `abstract_params`.

    Without a sharding they come to the first device, wherever they were when they were written.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: names or shapes differ from `abstract_params`.
    """
    folder = folder.absolute()
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} does not exist; expected the parameters of a network there.")
    first_device = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def target(stored: Any, expected: Any) -> jax.ShapeDtypeStruct:
        sharding = getattr(expected, "sharding", None) or first_device
        return jax.ShapeDtypeStruct(expected.shape, stored.dtype, sharding=sharding)

    with ocp.StandardCheckpointer() as checkpointer:
        found = checkpointer.metadata(folder).item_metadata.tree
        problems = _differences(found, abstract_params)
        if problems:
            raise ValueError(
                f"{folder} does not hold the parameters that config.json describes: " + "; ".join(problems)
            )
        return checkpointer.restore(folder, jax.tree.map(target, found, abstract_params))


def _differences(found: Params, expected: Params, limit: int = 5) -> list[str]:
    def shapes(tree: Params) -> dict[str, tuple[int, ...]]:
        return {jax.tree_util.keystr(path): tuple(leaf.shape) for path, leaf in jax.tree.leaves_with_path(tree)}

    found, expected = shapes(found), shapes(expected)
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} is unknown" for name in found if name not in expected]
    problems += [
        f"{name} has shape {found[name]}, expected {expected[name]}"
        for name in expected
        if name in found and found[name] != expected[name]
    ]
    return problems[:limit] + ([f"and {len(problems) - limit} more"] if len(problems) > limit else [])


def save_model(
    folder: pathlib.Path,
    config: ModelConfig,
    params: Mapping[str, Params],
    dtype: str | None = None,
    write_tokenizer: Callable[[pathlib.Path], Any] | None = None,
) -> None:
    """Writes the given networks, the config and the manifest; networks that are not given stay as they are."""
    unknown = sorted(set(params) - set(NETWORKS))
    if unknown:
        raise ValueError(f"params has unknown networks {unknown}; allowed are {NETWORKS}.")
    folder.mkdir(parents=True, exist_ok=True)
    for name, tree in params.items():
        save_params(folder / name, tree, dtype)
    if write_tokenizer is not None:
        write_tokenizer(folder / "tokenizer")
    (folder / "config.json").write_text(config.to_json(), encoding="utf-8")
    write_manifest(folder)


def restore_model(
    folder: pathlib.Path, abstract_params: Mapping[str, Params], *, verify: bool = True
) -> tuple[ModelConfig, dict[str, Params]]:
    """The config of a model folder and the parameters of the networks named in `abstract_params`.

    Raises:
        FileNotFoundError: the folder or a network is missing.
        ValueError: a file differs from the manifest, or parameters from the config.
    """
    if verify:
        verify_manifest(folder)
    config = load_model_config(folder)
    return config, {name: restore_params(folder / name, tree) for name, tree in abstract_params.items()}


def _digests(folder: pathlib.Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)
    digests = {}
    for path in files:
        with path.open("rb") as file:
            digests[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


def write_manifest(folder: pathlib.Path) -> None:
    (folder / MANIFEST).write_text(json.dumps(_digests(folder), indent=1) + "\n", encoding="utf-8")


def verify_manifest(folder: pathlib.Path) -> None:
    """Compares every file with the manifest. Orbax has no checksum of its own: a flipped bit would load in silence.

    Raises:
        FileNotFoundError: no manifest, so this is not a model folder.
        ValueError: names the files that are damaged, missing or unknown.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is not a model folder: it has no {MANIFEST}.")
    expected, found = json.loads(path.read_text(encoding="utf-8")), _digests(folder)
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} is not in the manifest" for name in found if name not in expected]
    problems += [f"{name} is damaged" for name in expected if name in found and found[name] != expected[name]]
    if problems:
        raise ValueError(f"Model folder {folder} differs from its {MANIFEST}: {'; '.join(problems[:5])}.")


def checkpoint_manager(folder: pathlib.Path, keep: int = 2) -> ocp.CheckpointManager:
    """Numbered training checkpoints, written beside the loop; the newest `keep` stay."""
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
    return ocp.CheckpointManager(folder.absolute(), options=options)
