"""lib.files: folders whole or absent, verified, and what a full disk leaves."""

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file

from lib.errors import UserError
from lib.files import (
    read_json,
    replacing,
    require_free,
    sha256,
    size_mb,
    swap,
    verified,
    versions,
    write_json,
    writing,
)


def listing(directory: Path) -> dict[str, bytes]:
    """Every file below a directory, hidden ones too, and its bytes."""
    return {p.relative_to(directory).as_posix(): p.read_bytes()
            for p in sorted(directory.rglob("*")) if p.is_file()}


def names(directory: Path) -> list[str]:
    return sorted(p.name for p in directory.iterdir())


def make(target: Path, value: float = 1.0) -> Path:
    """A small artifact: weights in a file, a note in a folder."""
    with writing(target, seed=7) as part:
        save_file({"w": torch.full((100,), value)}, part / "model.safetensors")
        (part / "sub").mkdir()
        (part / "sub" / "note.json").write_text(json.dumps(value))
    return target


def value_of(target: Path) -> float:
    assert verified(target)["seed"] == 7
    return float(load_file(target / "model.safetensors")["w"][0])


def test_an_artifact_and_its_manifest(tmp_path: Path) -> None:
    target = make(tmp_path / "deep" / "out")
    manifest = verified(target)
    assert names(target.parent) == ["out"]
    assert list(manifest) == ["files", "versions", "seed"]
    assert set(manifest["files"]) == {"model.safetensors", "sub/note.json"}
    assert manifest["files"]["model.safetensors"] == sha256(target / "model.safetensors")
    assert manifest["versions"] == versions()
    assert manifest["versions"]["torch"] == torch.__version__
    assert target.stat().st_mode & 0o777 == 0o755
    assert (target / "model.safetensors").stat().st_mode & 0o777 == 0o644
    assert size_mb(target) == size_mb(target / "model.safetensors") >= 400e-6


def test_an_artifact_or_an_empty_folder_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert value_of(make(tmp_path / "out", 1.0)) == 1
    assert value_of(make(tmp_path / "out", 2.0)) == 2
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt(),
                                   OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))])
@pytest.mark.parametrize("old", [False, True])
def test_an_exception_inside_leaves_what_was_there(tmp_path: Path, error: BaseException,
                                                   old: bool) -> None:
    target = tmp_path / "out"
    if old:
        make(target)
    before = listing(tmp_path)
    with pytest.raises(type(error)), writing(target) as part:
        (part / "half").write_text("half")
        raise error
    assert listing(tmp_path) == before
    assert names(tmp_path) == (["out"] if old else [])


@pytest.mark.parametrize("manifest", [
    None, '{"name": "My extension", "version": "1"}', "[]", "not JSON"])
def test_files_of_others_are_never_replaced(tmp_path: Path, manifest: str | None) -> None:
    """Browser extensions and web pages have a manifest.json, too."""
    target = tmp_path / "results"
    target.mkdir()
    (target / "thesis.txt").write_text("years of work")
    if manifest:
        (target / "manifest.json").write_text(manifest)
    before = listing(tmp_path)
    with pytest.raises(UserError, match="would be lost"):
        make(target)
    assert listing(tmp_path) == before


def test_a_file_added_to_an_artifact_is_not_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for _ in range(2):  # its own files are replaced, those of an artifact inside it, too
        with writing(out) as part, writing(part / "inner") as inner:
            (inner / "weights").write_text("new")
    (out / "inner" / "notes.txt").write_text("my own")
    with pytest.raises(UserError, match=r"notes.txt would be lost"), writing(out):
        pytest.fail("it began to work")
    assert (out / "inner" / "notes.txt").read_text() == "my own"


def test_what_appears_while_a_run_works_stays(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UserError, match="would be lost"), writing(out) as part:
        (part / "weights").write_text("new")
        out.mkdir()
        (out / "thesis.txt").write_text("years of work")
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "thesis.txt"]


@pytest.mark.parametrize("source", ["out", "out/adapter", "out/gone/../adapter", "link"])
def test_a_source_inside_the_target_is_refused(tmp_path: Path, source: str) -> None:
    with writing(tmp_path / "out") as part:
        (part / "adapter").mkdir()
    (tmp_path / "out" / "gone").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "out")
    with pytest.raises(UserError, match="which is read here: choose another"):
        require_free(tmp_path / "out", tmp_path / source)
    require_free(tmp_path / "out", "embedded", tmp_path / "other")
    require_free(tmp_path / "out" / "adapter" / "new", tmp_path / source)


def test_a_link_is_not_replaced(tmp_path: Path) -> None:
    """A rename would put the artifact beside the disk that the link leads to."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to("disk")
    with pytest.raises(UserError, match="is a link"):
        make(tmp_path / "out")
    assert (tmp_path / "out").is_symlink()


class Crash(BaseException):
    """Power off: nothing is tidied up afterwards."""


def crash_at(patch: pytest.MonkeyPatch, number: int) -> None:
    """Die at the given rename of a swap."""
    real, count = Path.rename, 0

    def rename(self: Path, target: Path) -> Path:
        nonlocal count
        count += 1
        if count == number:
            patch.setattr(shutil, "rmtree", lambda *_, **__: None)
            raise Crash
        return real(self, target)

    patch.setattr(Path, "rename", rename)


@pytest.mark.parametrize("numbers", [(1,), (2,), (2, 3)])
def test_a_crash_at_a_rename_leaves_the_old_artifact(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, numbers: tuple[int, ...]) -> None:
    """A second crash in the same place does no more harm than the first."""
    target = make(tmp_path / "out", 1.0)
    for number in numbers:
        with monkeypatch.context() as patch:
            crash_at(patch, number)
            with pytest.raises(Crash):
                make(target, 2.0)
        assert target.exists() is (number == 1), number
    assert value_of(target) == 1
    assert ".out.old" not in names(tmp_path)
    assert value_of(make(target, 3.0)) == 3


def test_a_failed_last_rename_puts_the_old_one_back(tmp_path: Path,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    target = make(tmp_path / "out", 1.0)
    real = Path.rename

    def rename(self: Path, to: Path) -> Path:
        if self.suffix == ".part":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(self, to)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(OSError, match="No space left"):
        make(target, 2.0)
    assert names(tmp_path) == ["out"] and value_of(target) == 1


def test_swap_into_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows does not rename over anything that exists."""
    real = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if target.exists():
            raise FileExistsError(target)
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    for name in ("part", "out"):
        (tmp_path / name).mkdir()
    (tmp_path / "part" / "file").touch()
    swap(tmp_path / "part", tmp_path / "out")
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "file"]


def damage(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def apply(file: Path) -> None:
        file.write_bytes(change(file.read_bytes()))
    return apply


@pytest.mark.parametrize("name", ["model.safetensors", "sub/note.json"])
@pytest.mark.parametrize("change", [
    damage(lambda data: data[:-1] + bytes([data[-1] ^ 1])), damage(lambda data: data[:-1]),
    Path.unlink])
def test_verified_finds_damage(tmp_path: Path, name: str, change: Callable[[Path], None]) -> None:
    target = make(tmp_path / "out")
    change(target / name)
    with pytest.raises(UserError, match=f"{name} is missing or damaged.*make it again"):
        verified(target)


@pytest.mark.parametrize("text", [
    None, b"", b"{", b"[]", b"{}", b'{"files": [], "versions": {}}', b"\xff"])
def test_verified_refuses_what_has_no_manifest(tmp_path: Path, text: bytes | None) -> None:
    target = make(tmp_path / "out")
    (target / "manifest.json").unlink()
    if text is not None:
        (target / "manifest.json").write_bytes(text)
    with pytest.raises(UserError, match="is not an artifact"):
        verified(target)


def test_json_is_written_whole_or_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, value = tmp_path / "new" / "value.json", {"a": [1, 2.5, None, True], "é": "ü\n"}
    write_json(path, value)
    assert read_json(path) == value and path.read_text().endswith("}\n")
    with pytest.raises(TypeError):
        write_json(path, object())

    def half(self: Path, text: str, **_: object) -> None:
        self.write_bytes(text.encode()[: len(text) // 2])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(KeyboardInterrupt):
        write_json(path, "new")
    assert read_json(path) == value and names(path.parent) == ["value.json"]
    with pytest.raises(OSError), replacing(path.parent) as part:
        part.touch()
    assert names(tmp_path) == ["new"]


def test_read_json_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no.json does not exist"):
        read_json(tmp_path / "no.json")
    for bad in (b"{", b"\xff", b"", b"[" * 100_000):
        (tmp_path / "bad.json").write_bytes(bad)
        with pytest.raises(UserError, match="bad.json is not readable JSON"):
            read_json(tmp_path / "bad.json")


def test_build_can_be_moved() -> None:
    code = "from lib.files import BUILD; print(BUILD)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True,
                          text=True, timeout=60, env=os.environ | {"COURSE_BUILD": "/x/y"})
    assert done.stdout.strip() == "/x/y"
