"""lib.artifacts: directories whole or absent, verified, and what a full disk leaves."""

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
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lib import artifacts
from lib.artifacts import (
    read_json,
    recover,
    require_free,
    sha256,
    size_mb,
    verified,
    versions,
    write_json,
    writing,
)
from lib.errors import UserError
from lib.scratch import saving, scratch

Change = Callable[[Path], None]


def listing(directory: Path) -> dict[str, bytes]:
    """Every file below a directory, hidden ones too, and its bytes."""
    return {p.relative_to(directory).as_posix(): p.read_bytes()
            for p in sorted(directory.rglob("*")) if p.is_file()}


def names(directory: Path) -> list[str]:
    """Names directly in a directory."""
    return sorted(p.name for p in directory.iterdir())


def make(target: Path, value: float = 1.0) -> Path:
    """A small artifact: weights in a file, a note in a folder."""
    with writing(target, seed=7) as part:
        save_file({"w": torch.full((100,), value)}, part / "model.safetensors")
        (part / "sub").mkdir()
        (part / "sub" / "note.json").write_text(json.dumps(value))
    return target


def value_of(target: Path) -> float:
    """What `make` was given."""
    assert verified(target)["seed"] == 7
    return float(load_file(target / "model.safetensors")["w"][0])


def test_writes_all_and_says_what(tmp_path: Path) -> None:
    target = make(tmp_path / "deep" / "out")
    manifest = verified(target)
    assert names(target.parent) == ["out"]
    assert set(manifest["files"]) == {"model.safetensors", "sub/note.json"}
    assert manifest["files"]["model.safetensors"] == sha256(target / "model.safetensors")
    assert manifest["seed"] == 7
    assert manifest["versions"] == versions()
    assert manifest["versions"]["torch"] == torch.__version__
    assert target.stat().st_mode & 0o777 == 0o755


def test_replaces_an_old_artifact(tmp_path: Path) -> None:
    target = make(make(tmp_path / "out", 1.0), 2.0)
    assert value_of(target) == 2
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt(), UserError("no")])
@pytest.mark.parametrize("old", [False, True])
def test_an_exception_inside_leaves_the_old_one(tmp_path: Path, error: BaseException,
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


def test_does_not_remove_a_directory_that_is_no_artifact(tmp_path: Path) -> None:
    """`--out ~/results` must not cost the user what else lies there."""
    target = tmp_path / "results"
    target.mkdir()
    (target / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="results"):
        make(target)
    assert listing(tmp_path) == {"results/thesis.txt": b"years of work"}


@pytest.mark.parametrize("text", ['{"name": "My extension", "version": "1"}', "[]", "no JSON"])
def test_another_programs_manifest_makes_no_artifact(tmp_path: Path, text: str) -> None:
    """Browsers' extensions and web pages have a file of that name, too."""
    target = tmp_path / "extension"
    target.mkdir()
    (target / "manifest.json").write_text(text)
    (target / "background.js").write_text("years of work")
    with pytest.raises(UserError, match="holds something else"):
        make(target)
    assert (target / "background.js").read_text() == "years of work"


def test_what_a_person_put_into_an_artifact_stays(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for _ in range(2):  # its own files are replaced, those of an artifact in it, too
        with writing(out) as part, writing(part / "inner") as inner:
            (inner / "weights").write_text("new")
    (out / "inner" / "notes.txt").write_text("my own")
    with pytest.raises(UserError, match=r"notes.txt is no part .* move it away"), writing(out):
        pytest.fail("it began to work")
    assert (out / "inner" / "notes.txt").read_text() == "my own"
    verified(out)


@pytest.mark.parametrize("name", [
    ".DS_Store", "inner/._weights", "Thumbs.db", ".ipynb_checkpoints/a-checkpoint.ipynb"])
def test_what_systems_leave_in_a_folder_goes_with_it(tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    for _ in range(2):  # into an empty folder, and over an artifact
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).touch()
        if name.startswith("inner"):
            shutil.rmtree(out / "inner")  # a folder of one's own is more than that
        with writing(out) as part:
            (part / "inner").mkdir()
            (part / "inner" / "weights").write_text("new")
        assert sorted(p.name for p in out.iterdir()) == ["inner", "manifest.json"]


def test_what_came_there_meanwhile_stays(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UserError, match="holds something else"), writing(out) as part:
        (part / "weights").write_text("new")
        out.mkdir()
        (out / "thesis.txt").write_text("years of work")
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "thesis.txt"]


@pytest.mark.parametrize("source", ["out", "out/adapter", "out/gone/../adapter"])
def test_what_is_read_is_not_replaced(tmp_path: Path, source: str) -> None:
    with writing(tmp_path / "out") as part:
        (part / "adapter").mkdir()
    (tmp_path / "out" / "gone").mkdir()
    with pytest.raises(UserError, match="which is read here: choose another"):
        require_free(tmp_path / "out", tmp_path / source)
    require_free(tmp_path / "out", "embedded", tmp_path / "out" / "none", tmp_path / "other")
    require_free(tmp_path / "out" / "adapter" / "new", tmp_path / source)


def test_links_that_lead_in_a_circle_are_named(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(UserError, match="loop is a link"):
        require_free(tmp_path / "loop", tmp_path / "loop")
    with writing(tmp_path / "out"):
        pass
    require_free(tmp_path / "out", tmp_path / "loop")


def test_a_link_to_what_would_be_replaced_is_seen_through(tmp_path: Path) -> None:
    with writing(tmp_path / "out"):
        pass
    (tmp_path / "other").symlink_to(tmp_path / "out")
    with pytest.raises(UserError, match="out holds .*other, which is read"):
        require_free(tmp_path / "out", tmp_path / "other")


def test_an_error_of_the_users_stays_what_it_is(tmp_path: Path) -> None:
    """What it quotes may look like the system's number."""
    with pytest.raises(UserError, match="exit code: 1"), saving(tmp_path):
        raise UserError("cell 3: RuntimeError: exit code: 1")


def test_another_place_that_is_full_is_not_the_temporary_folder(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left"), scratch():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path))
    with pytest.raises(UserError, match="cannot write .*other"), scratch(tmp_path / "other"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_temporary_folder_that_takes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> str:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("tempfile.mkdtemp", full)
    with pytest.raises(UserError, match="cannot write .*course .No space left"), scratch():
        pytest.fail("it began to work")


def test_a_link_is_not_replaced(tmp_path: Path) -> None:
    """A rename would put the artifact beside the disk that the link leads to."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to("disk")
    with pytest.raises(UserError, match="is a link"):
        make(tmp_path / "out")
    assert (tmp_path / "out").is_symlink()


def test_an_empty_directory_may_be_the_target(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert value_of(make(tmp_path / "out")) == 1


class Crash(BaseException):
    """Power off: no handler of ours may see it."""


def crash_at(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Die at the given rename of the final swap; nothing is tidied up."""
    real_rename, real_rmtree, count = Path.rename, shutil.rmtree, 0

    def rename(self: Path, target: Path) -> Path:
        nonlocal count
        count += 1
        if count == number:
            monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
            raise Crash
        return real_rename(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    monkeypatch.setattr(shutil, "rmtree", real_rmtree)


def between_renames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An artifact of value 1 whose replacement died between the two renames."""
    target = make(tmp_path / "out", 1.0)
    with monkeypatch.context() as patch:
        crash_at(patch, 2)
        with pytest.raises(Crash):
            make(target, 2.0)
    assert not target.exists()
    return target


def test_crash_before_the_first_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = make(tmp_path / "out", 1.0)
    with monkeypatch.context() as patch:
        crash_at(patch, 1)
        with pytest.raises(Crash):
            make(target, 2.0)
    assert value_of(target) == 1


def test_crash_between_the_renames_recovers(tmp_path: Path,
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    target = between_renames(tmp_path, monkeypatch)
    recover(target)
    assert value_of(target) == 1
    assert ".out.old" not in names(tmp_path)


def test_verified_recovers_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert value_of(between_renames(tmp_path, monkeypatch)) == 1


def test_second_crash_in_the_same_place(tmp_path: Path,
                                        monkeypatch: pytest.MonkeyPatch) -> None:
    """The old artifact outlives a rerun that dies before its own is in place."""
    target = between_renames(tmp_path, monkeypatch)
    with monkeypatch.context() as patch:
        # Without an artifact in place the swap's only rename is the last one.
        real = Path.rename

        def rename(self: Path, to: Path) -> Path:
            if Path(to) == target and not self.name.endswith(".old"):
                raise Crash
            return real(self, to)

        patch.setattr(Path, "rename", rename)
        with pytest.raises(Crash):
            make(target, 3.0)
    assert value_of(target) == 1


def test_failed_last_rename_puts_the_old_one_back(tmp_path: Path,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    target = make(tmp_path / "out", 1.0)
    real = Path.rename

    def rename(self: Path, to: Path) -> Path:
        if Path(to) == target and not self.name.endswith(".old"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(self, to)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(UserError, match="free some space"):
        make(target, 2.0)
    assert names(tmp_path) == ["out"]
    assert value_of(target) == 1


def test_recover_leaves_a_whole_artifact_alone(tmp_path: Path) -> None:
    target = make(tmp_path / "out", 1.0)
    make(tmp_path / ".out.old", 5.0)
    recover(target)
    assert value_of(target) == 1
    recover(tmp_path / "nothing")
    assert names(tmp_path) == [".out.old", "out"]


def flip_a_byte(target: Path) -> None:
    file = target / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0x10
    file.write_bytes(data)


def truncate(target: Path) -> None:
    file = target / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])


def remove_weights(target: Path) -> None:
    (target / "model.safetensors").unlink()


def alter_below(target: Path) -> None:
    (target / "sub" / "note.json").write_text("2.0")


def file_to_folder(target: Path) -> None:
    (target / "sub" / "note.json").unlink()
    (target / "sub" / "note.json").mkdir()


@pytest.mark.parametrize(("damage", "named"), [
    (flip_a_byte, "model.safetensors"), (truncate, "model.safetensors"),
    (remove_weights, "model.safetensors"), (alter_below, "note.json"),
    (file_to_folder, "note.json")])
def test_verified_finds_damage(tmp_path: Path, damage: Change, named: str) -> None:
    target = make(tmp_path / "out")
    verified(target)
    damage(target)
    with pytest.raises(UserError, match=f"{named} is missing or damaged.*make it again"):
        verified(target)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"files": []}', "\udcff"])
def test_verified_refuses_a_manifest_that_is_none(tmp_path: Path, text: str) -> None:
    target = make(tmp_path / "out")
    (target / "manifest.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match="manifest.json|no artifact"):
        verified(target)


def test_verified_refuses_what_is_no_artifact(tmp_path: Path) -> None:
    for target in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(UserError, match="is no artifact"):
            verified(target)


# A disk that is full: 64 KB a file, enforced by the kernel.
FULL_DISK = """
import json, resource, signal, sys
from pathlib import Path
import numpy as np
from safetensors.numpy import save_file
from lib.artifacts import writing, write_json
from lib.errors import UserError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (65536, resource.RLIM_INFINITY))
what, target = sys.argv[1], Path(sys.argv[2])
try:
    if what == "json":
        write_json(target, "x" * 200_000)
    else:
        with writing(target) as part:
            if what == "safetensors":
                save_file({"w": np.ones(100_000)}, part / "model.safetensors")
            else:
                (part / "weights").write_bytes(bytes(200_000))
except UserError as error:
    print(error)
    sys.exit(42)
"""


@pytest.mark.parametrize("what", ["json", "bytes", "safetensors"])
def test_full_disk_for_real(tmp_path: Path, what: str) -> None:
    target = tmp_path / ("out.json" if what == "json" else "out")
    if what == "json":
        write_json(target, "old")
    else:
        make(target)
    before = listing(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, what, str(target)], cwd=ROOT,
        capture_output=True, text=True, timeout=60)
    assert done.returncode == 42, done.stderr
    assert str(target.parent) in done.stdout and "free some space" in done.stdout
    assert done.stdout.count("\n") == 1
    assert listing(tmp_path) == before
    assert names(tmp_path) == [target.name]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES,
                                    errno.EFBIG])
@pytest.mark.parametrize("old", [False, True])
def test_injected_disk_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int,
                             old: bool) -> None:
    target = tmp_path / "out"
    if old:
        make(target)
    before = listing(tmp_path)

    def full(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(UserError, match=f"cannot write .*{os.strerror(number)}"):
        make(target, 2.0)
    assert listing(tmp_path) == before
    assert names(tmp_path) == (["out"] if old else [])


@pytest.mark.parametrize("text", ["I/O error: No space left on device (os error 28)",
                                  "Error while serializing: IoError(Os { code: 28, kind: "
                                  'StorageFull, message: "No space left on device" })'])
def test_safetensors_own_full_disk_error(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError, match="cannot write .*No space left"), \
            writing(tmp_path / "out"):
        raise SafetensorError(text)
    assert names(tmp_path) == []


def test_other_errors_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), saving(tmp_path):
        raise ZeroDivisionError
    with pytest.raises(OSError, match="Bad file"), saving(tmp_path):
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))


def test_write_below_a_file_is_the_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for call in (lambda: make(tmp_path / "file" / "out"),
                 lambda: write_json(tmp_path / "file" / "out.json", 1)):
        with pytest.raises(UserError, match="file"):
            call()
    assert listing(tmp_path) == {"file": b"mine"}


def test_write_json_round_trips(tmp_path: Path) -> None:
    path = tmp_path / "new" / "value.json"
    value = {"a": [1, 2.5, None, True], "é": "ü\n"}
    write_json(path, value)
    assert read_json(path) == value
    assert path.read_text().endswith("}\n")
    assert names(path.parent) == ["value.json"]


def test_write_json_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "value.json"
    write_json(path, "old")
    with pytest.raises(TypeError):
        write_json(path, object())
    assert read_json(path) == "old" and names(tmp_path) == ["value.json"]

    def half(self: Path, text: str, **_: object) -> None:
        self.write_bytes(text.encode()[: len(text) // 2])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(KeyboardInterrupt):
        write_json(path, "new")
    assert read_json(path) == "old" and names(tmp_path) == ["value.json"]


def test_write_json_over_a_directory(tmp_path: Path) -> None:
    with pytest.raises(UserError):
        write_json(tmp_path, 1)
    assert names(tmp_path) == []


def test_read_json_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no.json does not exist"):
        read_json(tmp_path / "no.json")
    for bad in (b"{", b"\xff", b""):
        (tmp_path / "bad.json").write_bytes(bad)
        with pytest.raises(UserError, match="bad.json is not readable JSON"):
            read_json(tmp_path / "bad.json")
    with pytest.raises(UserError, match="is not readable JSON"):
        read_json(tmp_path)


def test_sizes_are_on_disk(tmp_path: Path) -> None:
    target = make(tmp_path / "out")
    file = target / "model.safetensors"
    assert size_mb(file) == file.stat().st_size / 1e6
    assert size_mb(target) == size_mb(file)
    assert file.stat().st_size >= 400


def test_build_can_be_moved() -> None:
    code = "from lib.artifacts import BUILD; print(BUILD)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True,
                          text=True, timeout=60, env=os.environ | {"COURSE_BUILD": "/x/y"})
    assert done.stdout.strip() == "/x/y"
    assert artifacts.ROOT == ROOT
