"""How files are written here: whole, or not at all. And how the text that people write is read."""

import contextlib
import os
import pathlib
import platform
import re
import time
from collections.abc import Iterator
from typing import IO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_PART = re.compile(r"\..+\.(\d{1,9})\.part")
_STARTED = time.time()
_LINE_END = re.compile(r"\r\n|\r|\n")


def read_text(path: str | os.PathLike[str]) -> str:
    """The text of a UTF-8 file that a person or another program wrote, without a byte-order mark.

    Raises:
        ValueError: another encoding; names the file, the line, the encoding it may be and what to do.
        OSError: the file cannot be read.
    """
    content = pathlib.Path(path).read_bytes()
    for encoding, marks in _MARKS.items():
        if content.startswith(marks):
            raise ValueError(f"{path} is {encoding}; save it as UTF-8.")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        wrong = content[error.start : error.start + 1]
        guess = wrong.decode("cp1252", errors="ignore")
        perhaps = f", which is {guess} in Windows-1252" if guess.isprintable() and guess else ""
        where = f"{path} line {_line_number(content[: error.start])}"
        raise ValueError(f"{where} is not UTF-8: it has the byte {wrong[0]:#04x}{perhaps}; save it as UTF-8.") from None
    if "\0" in text:  # also what UTF-16 without a mark looks like
        line = _line_number(content[: content.index(b"\0")])
        raise ValueError(f"{path} line {line} has a NUL byte: it is UTF-16, or no text; save it as UTF-8.")
    return text


# The longer marks first: that of UTF-32 begins like that of UTF-16.
_MARKS = {"UTF-32": (b"\xff\xfe\0\0", b"\0\0\xfe\xff"), "UTF-16": (b"\xff\xfe", b"\xfe\xff")}


def _line_number(before: bytes) -> int:
    return len(re.findall(rb"\r\n|\r|\n", before)) + 1


def text_lines(text: str) -> list[str]:
    """The lines of a text as editors count them: `str.splitlines` would also break at characters that sentences may hold."""
    return _LINE_END.split(text)


@contextlib.contextmanager
def naming(path: pathlib.Path) -> Iterator[None]:
    """Gives the errors of the system that come from a block, such as a full disk, the name of the file, if they have none."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = os.fspath(path)
        raise


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A temporary name beside `path`, which takes its place if all goes well and is removed if not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with naming(path):
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


class Claim:
    """A folder that one process writes to at a time.

    The claim is a lock of the operating system on a file in the folder, so that it ends with its process, however that ends.
    """

    NAME = ".lock"

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder
        self._file: IO[str] | None = None
        self._made: list[pathlib.Path] = []

    def take(self) -> str | None:
        """Takes the folder, and makes it if it is not there; None, or why there is no lock on this file system.

        Raises:
            ValueError: another process has it.
            OSError: it cannot be written to.
        """
        if fcntl is None:
            return f"{self.folder} cannot be locked on this system: see to it that nothing else writes to it."
        while self._file is None:
            missing = [folder for folder in (self.folder, *self.folder.parents) if not os.path.lexists(folder)]
            self._made = self._made or missing
            self.folder.mkdir(parents=True, exist_ok=True)
            path = self.folder / self.NAME
            try:
                file = path.open("a+", encoding="utf-8")
            except FileNotFoundError:  # another process has just left, and taken its empty folder with it
                continue
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                with file:
                    file.seek(0)
                    who = file.read().strip() or "another process"
                raise ValueError(
                    f"{self.folder} is being written to by {who}: wait until it has ended, or give another folder."
                ) from None
            except OSError as error:  # some network file systems
                file.close()
                path.unlink(missing_ok=True)
                return f"{self.folder} cannot be locked ({error.strerror}): see to it that nothing else writes to it."
            # A process that let go in between has removed the name of the file that is locked now.
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                self._file = file
                file.truncate(0)
                file.write(f"process {os.getpid()} on {platform.node()}")
                file.flush()
            else:
                file.close()
        return None

    def release(self) -> None:
        """Lets go of the folder, and removes it if `take` has made it and nothing was put there."""
        if self._file is not None:
            (self.folder / self.NAME).unlink(missing_ok=True)
            self._file.close()
            self._file = None
        for folder in self._made:
            with contextlib.suppress(OSError):  # it is not empty
                folder.rmdir()
        self._made = []
