"""Who writes in a directory: one process, named by a locked file in it until that process ends, however it ends."""

import contextlib
import datetime
import errno
import fcntl
import json
import os
import socket
import time
import weakref
from pathlib import Path
from typing import Any

import jax
from absl import logging

from experiments.common.errors import UserError

_FILE = ".lock"
# Seconds to wait for a holder on another machine, which may be dead: a file server keeps a dead client's lock until its
# lease is over (NFS: 90 s). The system of this machine releases one at once.
PATIENCE = 150.0
# A file system without locks (some mounts of Lustre and FUSE) is written to unclaimed, with a warning.
_WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class Claim:
    """Held from its creation to `release`, or the process's end. Raises UserError where another process, or another
    part of this one, holds the directory: who, on which machine, since when."""

    def __init__(self, directory: Path):
        path, deadline = directory / _FILE, time.monotonic() + PATIENCE
        try:
            while (descriptor := _locked(path)) is None:
                holder = _holder(path)
                if holder.get("host", socket.gethostname()) == socket.gethostname() or time.monotonic() > deadline:
                    raise UserError(
                        f"{directory} is in use by {_describe(holder)}: wait for its end, or take another directory"
                    )
                time.sleep(1)
            _sign(descriptor)
        except OSError as error:
            raise UserError(f"cannot write in {directory}: {error.strerror} ({_FILE})") from error
        # Also for whoever forgets to release it.
        self.release = weakref.finalize(self, _release, path, descriptor, os.getpid())

    def __enter__(self) -> "Claim":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def owned(directory: Path) -> contextlib.AbstractContextManager:
    """A claim of the directory, which is made if there is none; of several processes of a run the first has it."""
    if jax.process_index():
        return contextlib.nullcontext()
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write in {directory}: {error.strerror}") from error
    return Claim(directory)


def _locked(path: Path) -> int | None:
    """The descriptor of the locked file; None where another holds it."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.exists(path) and os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            return None
        except OSError as error:
            if error.errno in _WITHOUT_LOCKS:
                logging.warning("%s cannot be locked here (%s): start no second run in it", path, error.strerror)
                return descriptor
            os.close(descriptor)
            raise
        os.close(descriptor)  # who held it has removed it since it was opened


def _sign(descriptor: int) -> None:
    since = datetime.datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    os.ftruncate(descriptor, 0)
    os.write(descriptor, json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": since}).encode())


def _holder(path: Path) -> dict[str, Any]:
    """What the holder wrote; {} where it has not yet, or is gone."""
    try:
        found = json.loads(path.read_bytes()[:1000])
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _describe(holder: dict[str, Any]) -> str:
    if not all(name in holder for name in ("host", "pid", "since")):
        return "another process"
    text = f"process {holder['pid']} on {holder['host']} since {holder['since']}"
    return "".join(character if character.isprintable() else "?" for character in text)


def _release(path: Path, descriptor: int, owner: int) -> None:
    if os.getpid() != owner:  # a fork of the holder, at its end
        return
    # Removed before it is unlocked: whoever locks it afterwards sees that it is gone, and makes a new one.
    with contextlib.suppress(OSError):
        if os.path.samestat(os.fstat(descriptor), os.stat(path)):
            os.unlink(path)
    os.close(descriptor)
