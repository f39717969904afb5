"""What the programs have in common: how they fail, which paths they take, where compiled programs are kept."""

import contextlib
import dataclasses
import functools
import os
import pathlib
import re
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import jax

from magref_jax import interrupts

# What a user can mend: a wrong option, file or folder, a full disk, a missing package. Anything else is a fault of ours.
EXPECTED = (ValueError, OSError, ImportError)
WRONG_REQUEST = 2  # exit status
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")  # two letters or more: `C:/` is a drive


@contextlib.contextmanager
def program(name: str) -> Iterator[None]:
    """Ends the process with a sentence on standard error if an expected error leaves the block, and quietly on Ctrl-C.

    Exit status 2 and 130. With `MAGREF_TRACEBACK=1` in the environment errors keep their traceback.
    """
    interrupts.raise_as_usual()
    try:
        yield
    except EXPECTED as error:
        if os.environ.get("MAGREF_TRACEBACK") == "1":
            raise
        print(f"{name}: {sentence(error)}", file=sys.stderr)
        sys.exit(WRONG_REQUEST)
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted", file=sys.stderr)
        sys.exit(interrupts.INTERRUPTED)


def check_devices() -> None:
    """Starts JAX's backend. To be called when all processes of a run have found each other.

    Raises:
        ValueError: it does not start; names the platforms that were asked for.
    """
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # the latter, without a word, of a platform that is not installed
        asked = getattr(jax.config, "jax_platforms", None)
        reason = str(error).partition("\n")[0] or "JAX has no such backend here"
        raise ValueError(
            f"JAX cannot start on JAX_PLATFORMS={asked or ''}: {reason}. Install what it needs, such as jax[cuda13] or jax[tpu], "
            "or set JAX_PLATFORMS=cpu."
        ) from None


def sentence(error: BaseException) -> str:
    """The message of an error; of an error of the system, the file and what is wrong with it, without a number."""
    if isinstance(error, OSError) and error.strerror:
        names = [str(name) for name in (error.filename, error.filename2) if name is not None]
        return f"{' -> '.join(names) or 'a file'}: {error.strerror}"
    return str(error) or type(error).__name__


def check_local(name: str, path: str | os.PathLike[str]) -> None:
    """Refuses `gs://bucket/x` and the like, which would become a local folder named `gs:`.

    Raises:
        ValueError: `path` begins with a scheme. `pathlib` makes `gs:/x` out of `gs://x`; both are refused.
    """
    text = os.fspath(path)
    if match := _SCHEME.match(text):
        raise ValueError(
            f"{name} {text}: {match[1]}:// cannot be read or written; give a local path, such as a mounted bucket."
        )


def check_local_fields(name: str, config: Any) -> None:
    """`check_local` of every path in a nested dataclass; `name.field` names it."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        for field in dataclasses.fields(config):
            check_local_fields(f"{name}.{field.name}", getattr(config, field.name))
    elif isinstance(config, (list, tuple)):
        for value in config:
            check_local_fields(name, value)
    elif isinstance(config, os.PathLike) or (isinstance(config, str) and "://" in config):
        check_local(name, config)


def check_output_folder(name: str, folder: str | os.PathLike[str]) -> None:
    """Refuses a folder that could not be made or written to. Makes nothing.

    Raises:
        ValueError: names the option, and what is in the way.
    """
    place = pathlib.Path(folder).absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        raise ValueError(f"{name} {folder}: {place} is a file, not a folder.")
    if not os.access(place, os.W_OK | os.X_OK):
        raise ValueError(f"{name} {folder}: {place} cannot be written to.")


def default_cache() -> pathlib.Path | None:
    """Where compiled programs are kept; None where JAX was told, or where no home folder can be written to."""
    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return None
    given = os.environ.get("XDG_CACHE_HOME")
    try:
        base = pathlib.Path(given) if given else pathlib.Path.home() / ".cache"
    except RuntimeError:  # a container with neither HOME nor an entry for its user
        return None
    folder = base / "magref_jax"
    return folder if _can_write(folder) else None


@functools.cache
def _can_write(folder: pathlib.Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def keep_compiled_programs(folder: str | os.PathLike[str] | None) -> None:
    """Keeps compiled programs in a folder, where the next process finds them; None keeps none."""
    if folder is not None:
        jax.config.update("jax_compilation_cache_dir", os.fspath(folder))
