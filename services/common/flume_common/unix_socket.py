"""Where a Unix socket can be whose own directory has too long a path for one, and who may open it.

A socket is as private as the directory it is in, and its path has at most 107 bytes. A socket that would
have more is kept in a private directory below the system's temporary one instead, always the same for one
path.
"""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from pathlib import Path

MAX_PATH_BYTES = 107
"""Of `sun_path`, without its final zero."""


class NotPrivate(Exception):
    """The directory belongs to someone else, or others may write to it."""


def socket_directory(directory: Path, longest_name: str) -> Path:
    """`directory` itself where a socket of this name fits, else one that stands for it."""
    absolute = directory.resolve()
    if len(os.fsencode(absolute / longest_name)) <= MAX_PATH_BYTES:
        return absolute
    digest = hashlib.sha256(os.fsencode(absolute)).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"flume-{os.getuid()}-{digest}"


def make_private(directory: Path) -> None:
    """Create it, or check that it is ours alone. Raises NotPrivate, OSError."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = directory.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise NotPrivate(f"{directory} belongs to user {found.st_uid}, not to us")
    if found.st_mode & 0o077:
        directory.chmod(0o700)
