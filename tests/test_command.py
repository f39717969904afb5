import dataclasses
import errno
import os
import pathlib
import pwd
import signal
import subprocess
import sys
import time

import jax
import pytest

from magref_jax import command

ROOT = pathlib.Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("error", "message", "status"),
    [
        (ValueError("steps=0 must be positive"), "tool: steps=0 must be positive", 2),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "a.txt"), "tool: a.txt: No such file", 2),
        (OSError(errno.ENOSPC, "No space left on device"), "tool: a file: No space left on device", 2),
        (ModuleNotFoundError("no module named x"), "tool: no module named x", 2),
        (KeyboardInterrupt(), "tool: interrupted", 130),
    ],
)
def test_an_expected_error_is_one_sentence_and_a_status(capsys, error, message, status):
    with pytest.raises(SystemExit) as exit, command.program("tool"):
        raise error
    printed = capsys.readouterr().err
    assert exit.value.code == status
    assert message in printed
    assert "Errno" not in printed
    assert "Traceback" not in printed


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch):
    with pytest.raises(KeyError), command.program("tool"):
        raise KeyError("x")
    monkeypatch.setenv("MAGREF_TRACEBACK", "1")
    with pytest.raises(ValueError, match="wanted"), command.program("tool"):
        raise ValueError("wanted")


@pytest.mark.parametrize("path", ["gs://bucket/x", "s3://bucket/x", "hf://a/b", "file:///x", pathlib.Path("gs://b/x")])
def test_a_path_with_a_scheme_is_refused_by_name(path):
    with pytest.raises(ValueError, match=r"--out (gs|s3|hf|file):/"):
        command.check_local("--out", path)


@pytest.mark.parametrize("path", ["a/b", "/a/b", "a:b", "C:/x", "C:\\x", "scene 1: a dog.png", pathlib.Path("a/gs:b")])
def test_a_local_path_is_not(path):
    command.check_local("--out", path)


def test_paths_of_a_nested_config_are_named_by_their_field():
    @dataclasses.dataclass
    class Data:
        folders: tuple[str, ...]

    @dataclasses.dataclass
    class Config:
        data: Data
        text: str = "a: b"

    command.check_local_fields("config", Config(Data(("a", "b"))))
    with pytest.raises(ValueError, match=r"^config.data.folders gs://b:"):
        command.check_local_fields("config", Config(Data(("a", "gs://b"))))


def test_the_cache_is_in_the_home_folder_or_where_one_says_or_nowhere(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert command.default_cache() == tmp_path / "cache" / "magref_jax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert command.default_cache() == tmp_path / "home" / ".cache" / "magref_jax"

    def unknown(uid):
        raise KeyError(uid)

    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    assert command.default_cache() is None
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert command.default_cache() is None


def test_the_cache_is_a_setting_of_jax(tmp_path):
    before = jax.config.jax_compilation_cache_dir
    try:
        command.keep_compiled_programs(None)
        assert jax.config.jax_compilation_cache_dir == before
        command.keep_compiled_programs(tmp_path / "programs")
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "programs")
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


@pytest.mark.parametrize(
    ("platform", "reason"),
    [("cuda", "JAX has no such backend here"), ("nonsense", "Unable to initialize backend 'nonsense'")],
)
def test_a_platform_that_is_not_there_is_one_sentence(platform, reason):
    code = "from magref_jax import command\nwith command.program('tool'):\n    command.check_devices()"
    environment = os.environ | {"JAX_PLATFORMS": platform}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("tool:")]
    assert f"JAX cannot start on JAX_PLATFORMS={platform}: {reason}" in line
    assert "JAX_PLATFORMS=cpu" in line
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("script", ["train.py configs/smoke.py", "sample.py", "convert_torch_weights.py here there"])
def test_ctrl_c_while_the_libraries_load_says_nothing(tmp_path, script):
    program, *words = script.split()
    command = [sys.executable, str(ROOT / program), *words]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    maps = pathlib.Path(f"/proc/{process.pid}/maps")
    while process.poll() is None and "jaxlib" not in maps.read_text():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert said.strip() in ("", f"{program}: interrupted")
    assert list(tmp_path.iterdir()) == []
