"""Work folders that go again, and files that are whole or absent.

What is made lies beside its target until it is whole, and is renamed then.
"""

import contextlib
import errno
import glob
import os
import platform
import re
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from lib.errors import UserError

# What the user can mend: full, over quota, too large, read-only, not a folder.
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM,
              errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP)
# A process is known by its number only on its own machine.
_HOST = f"{zlib.crc32(platform.node().encode()):x}"


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A scratch file that becomes `path` only if the block succeeds."""
    path = Path(path)
    with scratch(path) as folder:
        part = folder / "part"
        yield part
        part.replace(path)


_MINE: set[str] = set()


@contextlib.contextmanager
def scratch(target: Path | None = None) -> Iterator[Path]:
    """A folder beside `target`, or among the system's temporary ones, for the block alone.

    What killed processes have left there goes first; what living ones use stays.
    """
    # What fails in a block without a target was written elsewhere.
    place = target or Path(tempfile.gettempdir()) / "course"
    with saving(target) if target else contextlib.nullcontext(), parents(place):
        prefix = f".{place.name}.{_HOST}-"
        for left in place.parent.glob(f"{glob.escape(prefix)}*.part"):
            if _abandoned(left):
                shutil.rmtree(left, ignore_errors=True)
        with saving(place):
            part = Path(tempfile.mkdtemp(".part", f"{prefix}{os.getpid()}-", place.parent))
        _MINE.add(part.name)
        try:
            yield part
        finally:
            # Windows deletes no file that a tensor is mapped to; the next run will.
            shutil.rmtree(part, ignore_errors=True)
            _MINE.discard(part.name)


def there(path: Path) -> bool:
    """Something has this name; a name that nothing can have, say a long one, is free."""
    with contextlib.suppress(OSError):
        return path.exists()
    return False


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
    except Exception as error:
        # safetensors (in Rust) reports the same conditions as its own error.
        found = re.search(r"(?:os error|code:) (\d+)", str(error))
        number = error.errno if isinstance(error, OSError) else found and int(found[1])
        if isinstance(error, UserError) or number not in UNWRITABLE:
            raise
        reason = getattr(error, "strerror", None) or os.strerror(number)
        raise UserError(f"cannot write {where} ({reason}): free some space or "
                        "choose another folder; nothing was left behind") from None
