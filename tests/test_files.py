"""Files that are written whole, folders that one process writes to, and text that people saved: read, or refused by line."""

import errno
import os
import pathlib
import re
import subprocess
import sys

import pytest

from magref_jax import files
from magref_jax.command import sentence
from magref_jax.files import Claim, read_text, replacing, text_lines

CAFE = "naïve\ncafé\u2028狐\n"  # U+2028 separates lines for `str.splitlines`, and nowhere else


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_text_is_read_and_cut_as_editors_do(tmp_path, encoding, end):
    path = tmp_path / "a.txt"
    path.write_bytes(CAFE.replace("\n", end).encode(encoding))
    assert text_lines(read_text(path)) == ["naïve", "café\u2028狐", ""]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a\ncafé".encode("cp1252"), "line 2 is not UTF-8: it has the byte 0xe9, which is é in Windows-1252"),
        ("a\r\rcafé".encode("cp1252"), "line 3 is not UTF-8"),
        ("狐".encode("gb18030"), "line 1 is not UTF-8: it has the byte 0xba"),
        (b"ab\x81", "line 1 is not UTF-8: it has the byte 0x81; save"),  # no character of Windows-1252
        ("a\ncafé".encode("utf-16"), "is UTF-16; save it as UTF-8"),
        ("a\ncafé".encode("utf-32"), "is UTF-32; save it as UTF-8"),
        ("a\nb".encode("utf-16-le"), "line 1 has a NUL byte: it is UTF-16, or no text"),
        (b"a\nb\0", "line 2 has a NUL byte"),
    ],
)
def test_other_encodings_are_named_with_file_and_line(tmp_path, content, message):
    path = tmp_path / "list.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^{re.escape(str(path))} {re.escape(message)}"):
        read_text(path)


def test_what_a_full_disk_says_has_the_name_of_the_file(tmp_path):
    with pytest.raises(OSError, match="No space left") as raised, replacing(tmp_path / "a.txt"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert raised.value.filename == str(tmp_path / "a.txt")
    assert sentence(raised.value) == f"{tmp_path / 'a.txt'}: No space left on device"
    assert list(tmp_path.iterdir()) == []


def test_contents_are_on_the_disk_before_they_have_their_name(tmp_path, monkeypatch):
    # A power loss cannot be had in a test: what the system is asked for, in order, can.
    asked = []

    def fsync(descriptor: int) -> None:
        asked.append(("flush", os.fstat(descriptor).st_ino, os.fstat(descriptor).st_size))
        flush(descriptor)

    def replace(source: os.PathLike, target: os.PathLike) -> None:
        asked.append(("name", os.stat(source).st_ino, os.stat(source).st_size))
        move(source, target)

    flush, move = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    with replacing(tmp_path / "a.txt") as part:
        part.write_text("all of it")
    assert (tmp_path / "a.txt").read_text() == "all of it"
    status = (tmp_path / "a.txt").stat()
    assert asked == [("flush", status.st_ino, 9), ("name", status.st_ino, 9)]


HOLD = """
import pathlib, sys
from magref_jax.files import Claim
claim = Claim(pathlib.Path(sys.argv[1]))
print(claim.take(), flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(os.name != "posix", reason="there are no locks of this kind")
def test_a_folder_belongs_to_one_process_until_that_ends(tmp_path):
    out = tmp_path / "a" / "b"
    command = [sys.executable, "-c", HOLD, str(out)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "None\n"
        claim = Claim(out)
        with pytest.raises(ValueError, match=rf"^{out} is being written to by process {other.pid} on .*: wait until"):
            claim.take()
        claim.release()  # of what it does not have
        assert [path.name for path in out.iterdir()] == [Claim.NAME]
        other.kill()
        other.wait()
    assert claim.take() is None
    with pytest.raises(ValueError, match=f"by process {os.getpid()} on"):
        Claim(out).take()
    claim.release()
    assert list(out.iterdir()) == []  # which the other process had made
    assert claim.take() is None  # again
    claim.release()


def test_a_claim_leaves_what_was_there_and_nothing_else(tmp_path):
    claim = Claim(tmp_path / "a" / "b")
    claim.take()
    (tmp_path / "a" / "kept").touch()
    claim.release()
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "kept"]
    (tmp_path / "file").touch()
    for folder in ("file", "file/below"):
        with pytest.raises(OSError, match="file"):
            Claim(tmp_path / folder).take()


@pytest.mark.parametrize("system", ["no locks on this file system", "no fcntl"])
def test_without_locks_one_is_told(tmp_path, monkeypatch, system):
    def refuse(file, flags):
        raise OSError(37, "No locks available")

    if system == "no fcntl":
        monkeypatch.setattr(files, "fcntl", None)
    else:
        monkeypatch.setattr(files.fcntl, "flock", refuse)
    claim = Claim(tmp_path / "out")
    assert re.match(rf"{tmp_path}.out cannot be locked.*: see to it that nothing else writes to it", claim.take())
    claim.release()
    assert list(pathlib.Path(tmp_path).iterdir()) == []
