"""Artifacts: folders that are whole or absent, written beside the target, renamed, verified.
`manifest.json` has the SHA-256 of each file. A killed run leaves the old artifact or the new."""

import contextlib
import hashlib
import importlib.metadata
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lib.errors import UserError, require

ROOT = Path(__file__).resolve().parent.parent
BUILD = Path(os.environ.get("COURSE_BUILD") or ROOT / "build").expanduser()
MANIFEST = "manifest.json"
PACKAGES = ("torch", "transformers", "peft", "trl", "bitsandbytes", "gguf", "xllamacpp")


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def size_mb(path: Path) -> float:
    """Size in MB (10^6 bytes) of a file, or of the weights in a folder."""
    files = [path] if path.is_file() else path.glob("*.safetensors")
    return sum(f.stat().st_size for f in files) / 1e6


def versions() -> dict[str, str]:
    """Version of each package that affects a result."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def read_json(path: Path) -> Any:
    """Parse a JSON file; UserError names the file if it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: check the path") from None
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{path} is not readable JSON ({error}): make it again") from None


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON; ValueError for a key that it has twice."""
    keys = [key for key, _ in pairs]
    if len({*keys}) < len(keys):
        raise ValueError(f"{max(keys, key=keys.count)!r} is twice in one object")
    return dict(pairs)


def in_call_order(turns: Sequence[dict[str, Any]]) -> bool:
    """Whether tools answer in the order of their calls, which most templates show without ids."""
    calls = [c["id"] for turn in turns for c in turn.get("tool_calls") or () if c.get("id")]
    answers, order = itertools.groupby(turn.get("tool_call_id") for turn in turns), iter(calls)
    return all(number in order for number, _ in answers if number in calls)


def write_json(path: Path, value: Any) -> None:
    """Write JSON beside `path`, then rename it into place."""
    with replacing(path) as part:
        part.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8", newline="\n")


@contextlib.contextmanager
def scratch(target: Path | None = None) -> Iterator[Path]:
    """A private folder for one block, beside `target` or among the system's temporary ones."""
    place = target or Path(tempfile.gettempdir(), "course")
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(  # Windows keeps a file that a tensor maps
            ".part", f".{place.name}.", place.parent, ignore_cleanup_errors=True) as part:
        yield Path(part)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A scratch file that becomes `path` only if the block succeeds."""
    with scratch(path) as folder:
        yield folder / "part"
        (folder / "part").replace(path)


@contextlib.contextmanager
def writing(target: Path, **facts: Any) -> Iterator[Path]:
    """A scratch folder that becomes an artifact if the block succeeds, `facts` in its manifest."""
    require_free(target, **facts)
    with scratch(target) as part:
        yield part
        files = {f.relative_to(part).as_posix(): sha256(f)
                 for f in sorted(part.rglob("*")) if f.is_file()}
        write_json(part / MANIFEST, {"files": files, "versions": versions(), **facts})
        # Scratch folders and safetensors files are private; an artifact is for everyone to read.
        for path in (part, *part.rglob("*")):
            path.chmod(0o755 if path.is_dir() else 0o644)
        swap(part, target)


def require_free(target: Path, *sources: Path | str, **facts: Any) -> None:
    """UserError unless `target` is absent, empty, or an artifact without one of the `sources`,
    which has one of the `facts`: an export does not replace an adapter."""
    require(target.name, f"{target} is the folder you are in: choose a new one")
    require(not target.is_symlink(), f"{target} is a link: name the folder it leads to")
    recover(target)
    require(target.is_dir() or not target.exists(), f"{target} is a file: choose another folder")
    for source in map(Path, sources):
        require(not source.resolve().is_relative_to(target.resolve()),
                f"{target} holds {source}, which is read here: choose another folder")
    old = _manifest(target)
    kind = {*old} - {"files", "versions", "base"}
    require(not (kind and facts) or kind & {*facts},
            f"{target} holds a result of another kind: choose another folder")
    own = {MANIFEST, *old["files"]} if old else set()
    for file in target.rglob("*"):
        require(file.is_dir() or file.relative_to(target).as_posix() in own,
                f"{file} would be lost: move it away, or choose another folder")


def _manifest(target: Path) -> dict[str, Any]:
    """The manifest of an artifact; empty for other folders, which may have one, too."""
    with contextlib.suppress(UserError, LookupError, TypeError):
        manifest = read_json(target / MANIFEST)
        if "versions" in manifest and isinstance(manifest["files"], dict):
            return manifest
    return {}


def swap(part: Path, target: Path) -> None:
    """Rename `part` to `target`, keeping the old artifact until the new one is in place."""
    require_free(target)  # something may have been put there in the meantime
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    try:
        part.rename(target)
    except OSError:
        recover(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def recover(target: Path) -> None:
    """Put the old artifact back if a run died between the two renames."""
    old = (target := target.resolve()).with_name(f".{target.name}.old")
    if old.exists() and not target.exists():
        old.rename(target)


def verified(target: Path) -> dict[str, Any]:
    """The manifest of an artifact. UserError unless each file has its hash."""
    recover(target)
    manifest = _manifest(target)
    require(manifest, f"{target} is not an artifact of this course, or its {MANIFEST} is "
            "damaged: check the path, or make it again")
    for name, digest in manifest["files"].items():
        file = target / name
        require(file.is_file() and sha256(file) == digest,
                f"{file} is missing or damaged: delete {target} and make it again")
    return manifest
