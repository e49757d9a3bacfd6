"""One process at a time in a run's folder."""

import contextlib
import errno
import fcntl
import os
import pathlib
from collections.abc import Iterator


@contextlib.contextmanager
def alone(workdir: pathlib.Path) -> Iterator[None]:
    """Holds the folder, made if need be, for this process; the end of the process frees it too.

    Two runs in one folder would write every step twice and delete each other's checkpoints. Where
    the file system knows no locks, nothing is held.

    Raises:
      ValueError: another process holds it.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    held = os.open(workdir, os.O_RDONLY)
    try:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise ValueError(
                    f"another process is training in {workdir}: let it end, or choose another "
                    "--workdir"
                ) from None
        yield
    finally:
        os.close(held)
