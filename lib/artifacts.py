"""Directories that are whole or absent: written beside, renamed, verified.

An artifact is a directory of safetensors and JSON files with a
`manifest.json` that names the SHA-256 of each. A killed run leaves the old
artifact or the new one, never half of one.
"""

import contextlib
import errno
import gc
import glob
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lib.errors import UserError, require

ROOT = Path(__file__).resolve().parent.parent
BUILD = Path(os.environ.get("COURSE_BUILD", ROOT / "build"))
MANIFEST = "manifest.json"
# What the user can mend: full, over quota, too large, read-only, not a folder.
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM,
              errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP)
# A process is known by its number only on its own machine.
HOST = f"{zlib.crc32(platform.node().encode()):x}"
PACKAGES = ("torch", "transformers", "peft", "trl", "bitsandbytes", "gguf", "xllamacpp")


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def size_mb(path: Path) -> float:
    """Size in MB (10^6 bytes) of a file, or of the weights in a directory."""
    files = [path] if path.is_file() else path.glob("*.safetensors")
    return sum(f.stat().st_size for f in files) / 1e6


def versions() -> dict[str, str]:
    """Version of each package that decides a result."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def read_json(path: Path) -> Any:
    """Parse a JSON file; UserError names the file when it is no JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: check the path") from None
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{path} is not readable JSON ({error}): make it again") from None


def write_json(path: Path, value: Any) -> None:
    """Write JSON beside `path`, then rename it into place."""
    with replacing(path) as part:
        part.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8", newline="\n")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A scratch file that becomes `path` only if the block succeeds."""
    path = Path(path)
    with saving(path), scratch(path) as folder:
        part = folder / "part"
        yield part
        part.replace(path)


_MINE: set[str] = set()


@contextlib.contextmanager
def scratch(target: Path | None = None) -> Iterator[Path]:
    """A folder beside `target`, or among the system's temporary ones, for the block alone.

    What killed processes have left there goes first; what living ones use stays.
    """
    target = target or Path(tempfile.gettempdir()) / "course"
    with parents(target):
        prefix = f".{target.name}.{HOST}-"
        for left in target.parent.glob(f"{glob.escape(prefix)}*.part"):
            if _abandoned(left):
                shutil.rmtree(left, ignore_errors=True)
        part = Path(tempfile.mkdtemp(".part", f"{prefix}{os.getpid()}-", target.parent))
        _MINE.add(part.name)
        try:
            yield part
        finally:
            # Windows deletes no file that a tensor is mapped to; the next run will.
            shutil.rmtree(part, ignore_errors=True)
            _MINE.discard(part.name)


def _abandoned(part: Path) -> bool:
    """The process that made this folder is no more, whoever has its number now."""
    import psutil  # here, because the doctor reads this module where it may be missing

    number = part.name.split("-")[-2]
    if part.name in _MINE or not number.isdecimal():
        return False
    try:
        owner = psutil.Process(int(number))
        # In a container every run may have the same number. Starting times are rounded.
        return (owner.pid == os.getpid() or owner.status() == psutil.STATUS_ZOMBIE
                or owner.create_time() > part.stat().st_mtime + 2)
    except (psutil.NoSuchProcess, FileNotFoundError):
        return True


@contextlib.contextmanager
def parents(target: Path) -> Iterator[None]:
    """Make the folders above `target`; those that stay empty go again."""
    new = [folder for folder in target.parents if not folder.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        for folder in new:
            with contextlib.suppress(OSError):  # not empty
                folder.rmdir()


@contextlib.contextmanager
def saving(where: Path) -> Iterator[None]:
    """Turn a full or read-only disk into a UserError that says where."""
    try:
        yield
    except OSError as error:
        if error.errno in UNWRITABLE:
            raise UserError(
                f"cannot write {where} ({error.strerror}): free some space or "
                "choose another folder; nothing was left behind") from None
        raise
    except Exception as error:
        # safetensors (in Rust) reports the same conditions as its own error.
        number = re.search(r"(?:os error|code:) (\d+)", str(error))
        if number and int(number[1]) in UNWRITABLE:
            reason = os.strerror(int(number[1])).lower()
            raise UserError(f"cannot write {where} ({reason}): free some space or choose "
                            "another folder; nothing was left behind") from None
        raise


@contextlib.contextmanager
def writing(target: Path, **facts: Any) -> Iterator[Path]:
    """A scratch directory that becomes `target` only if the block succeeds.

    `facts` (config, seed, scores) and the package versions go into the
    manifest beside the file hashes.
    """
    target = Path(target)
    require_free(target)
    with saving(target), scratch(target) as part:
        yield part
        files = {f.relative_to(part).as_posix(): sha256(f)
                 for f in sorted(part.rglob("*")) if f.is_file()}
        write_json(part / MANIFEST, {"files": files, "versions": versions(), **facts})
        # Scratch files are private; an artifact is for everyone to read.
        part.chmod(0o755)
        for file in part.rglob("*"):
            file.chmod(0o755 if file.is_dir() else 0o644)
        swap(part, target)


def require_free(target: Path) -> None:
    """UserError unless `target` is absent, empty, or an artifact to replace; links stay."""
    require(target.name, f"{target} is the folder you are in: choose a new one")
    with saving(target):
        require(not target.is_symlink(), f"{target} is a link: name the folder it leads to")
        recover(target)
        free = not target.exists() or (target.is_dir() and not any(target.iterdir()))
        require(free or _is_ours(target), f"{target} holds something else: choose another folder")


def _is_ours(target: Path) -> bool:
    """It has a manifest as `writing` makes it: other programs name files so, too."""
    try:
        return {"files", "versions"} <= read_json(target / MANIFEST).keys()
    except (UserError, AttributeError):
        return False


def swap(part: Path, target: Path) -> None:
    """Rename `part` to `target`, keeping the old one until the new one is in."""
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        _rename(target, old)
    try:
        _rename(part, target)
    except OSError:
        recover(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _rename(source: Path, target: Path) -> None:
    try:
        source.rename(target)
    except PermissionError:
        gc.collect()  # Windows moves no file that a tensor is mapped to, a forgotten one, too
        source.rename(target)


def recover(target: Path) -> None:
    """Put the old artifact back if a run died between the two renames."""
    old = target.with_name(f".{target.name}.old")
    if old.exists() and not target.exists():
        old.rename(target)


def verified(target: Path) -> dict[str, Any]:
    """Manifest of an artifact whose files all have their stated hashes.

    Raises:
        UserError: no artifact here, a file missing, or a file altered.
    """
    target = Path(target)
    recover(target)
    require((target / MANIFEST).is_file(),
            f"{target} is no artifact of this course (no {MANIFEST}): check the path")
    manifest = read_json(target / MANIFEST)
    files = manifest.get("files") if isinstance(manifest, dict) else None
    require(files and isinstance(files, dict),
            f"{target / MANIFEST} lists no files: delete {target} and make it again")
    for name, digest in files.items():
        file = target / name
        require(_intact(file, digest),
                f"{file} is missing or damaged: delete {target} and make it again")
    return manifest


def _intact(file: Path, digest: Any) -> bool:
    try:
        return file.is_file() and sha256(file) == digest
    except OSError:  # a damaged manifest may hold any name
        return False
