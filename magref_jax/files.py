"""How files are written here: whole, or not at all."""

import contextlib
import os
import pathlib
import re
import time
from collections.abc import Iterator

_PART = re.compile(r"\..+\.(\d{1,9})\.part")
_STARTED = time.time()


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A temporary name beside `path`, which takes its place if all goes well and is removed if not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        # The contents go to the disk before the name does: otherwise a power loss may leave an empty file in the place of a
        # good one. It takes milliseconds; what is written here took minutes.
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def remove_leftovers(folder: pathlib.Path) -> list[pathlib.Path]:
    """Removes what `replacing` left in a folder when a process was killed, and says what that was.

    Files of processes that still run on this machine stay: they are being written.
    """
    removed = []
    for path in sorted(folder.glob(".*.part")):
        match = _PART.fullmatch(path.name)
        if match and path.is_file() and not _is_being_written(path, int(match[1])):
            path.unlink(missing_ok=True)
            removed.append(path)
    return removed


def _is_being_written(path: pathlib.Path, pid: int) -> bool:
    if pid == os.getpid():  # in a container every run may have the same one
        return path.stat().st_mtime >= _STARTED
    if os.name != "posix":  # elsewhere signal 0 is not a question
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it runs, as another user
        return True
    return True
