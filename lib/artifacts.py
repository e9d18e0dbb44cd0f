"""Directories that are whole or absent: written beside, renamed, verified.

An artifact is a directory of safetensors and JSON files with a
`manifest.json` that names the SHA-256 of each. A killed run leaves the old
artifact or the new one, never half of one.
"""

import contextlib
import gc
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lib.errors import UserError, require
from lib.scratch import replacing, saving, scratch, there

ROOT = Path(__file__).resolve().parent.parent
BUILD = Path(os.environ.get("COURSE_BUILD", ROOT / "build"))
MANIFEST = "manifest.json"
# What systems and programs leave in a folder that somebody has looked into.
LITTER = re.compile(r"\.DS_Store|\._.*|Thumbs\.db|desktop\.ini|\.nfs.*|\.ipynb_checkpoints")
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
def writing(target: Path, **facts: Any) -> Iterator[Path]:
    """A scratch directory that becomes `target` only if the block succeeds.

    `facts` (config, seed, scores) and the package versions go into the
    manifest beside the file hashes.
    """
    target = Path(target)
    require_free(target)
    with scratch(target) as part:
        yield part
        files = {f.relative_to(part).as_posix(): sha256(f)
                 for f in sorted(part.rglob("*")) if f.is_file()}
        write_json(part / MANIFEST, {"files": files, "versions": versions(), **facts})
        # Scratch files are private; an artifact is for everyone to read.
        part.chmod(0o755)
        for file in part.rglob("*"):
            file.chmod(0o755 if file.is_dir() else 0o644)
        swap(part, target)


def require_free(target: Path, *sources: Path | str) -> None:
    """UserError unless `target` is absent, empty, or an artifact to replace; links stay.

    It may hold no other files and none of the `sources`: they would go with it.
    """
    require(target.name, f"{target} is the folder you are in: choose a new one")
    with saving(target):
        require(not target.is_symlink(), f"{target} is a link: name the folder it leads to")
        recover(target)
        if not target.exists():
            return
        # Files are compared, since names may differ in case, links and dots.
        for source in filter(there, map(Path, sources)):
            require(not any(place.samefile(target) for place in
                            (source.resolve(), *source.resolve().parents)),
                    f"{target} holds {source}, which is read here: choose another folder")
        ours = _files(target)
        require(target.is_dir(), f"{target} holds something else: choose another folder")
        for file in target.rglob("*") if ours else target.iterdir():
            name = file.relative_to(target)
            if any(map(LITTER.fullmatch, name.parts)) or (ours and file.is_dir()):
                continue
            require(ours, f"{target} holds something else: choose another folder")
            require(name.as_posix() in ours, f"{file} is no part of what would be replaced: "
                    "move it away, or choose another folder")


def _files(target: Path) -> set[str]:
    """What an artifact says it has; nothing for what other programs name a manifest."""
    try:
        manifest = read_json(target / MANIFEST)
        return {MANIFEST, *manifest["files"]} if "versions" in manifest else set()
    except (UserError, LookupError, TypeError):
        return set()


def swap(part: Path, target: Path) -> None:
    """Rename `part` to `target`, keeping the old one until the new one is in."""
    require_free(target)  # somebody may have put something there meanwhile
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
    if there(old) and not target.exists():
        old.rename(target)


def verified(target: Path) -> dict[str, Any]:
    """Manifest of an artifact whose files all have their stated hashes.

    Raises:
        UserError: no artifact here, a file missing, or a file altered.
    """
    target = Path(target)
    recover(target)
    require(there(target / MANIFEST),
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
