"""Exclusive use of a directory: a locked file names the process that writes in it, until that process ends."""

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
# lease expires (NFS: 90 s). Locks of this machine are released at once.
PATIENCE = 150.0
# On a file system without locks (some mounts of Lustre and FUSE) nothing is claimed, with a warning.
_WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class InUse(UserError):
    """Another process, or another part of this one, holds the directory."""


class Claim:
    """Held from its creation to `release` or the end of the process. Raises InUse, which names the process that holds
    the directory, its machine and its start, and UserError for a directory that cannot be written."""

    def __init__(self, directory: Path):
        path, deadline = directory / _FILE, time.monotonic() + PATIENCE
        try:
            while (descriptor := _locked(path)) is None:
                holder = _holder(path)
                if holder.get("host", socket.gethostname()) == socket.gethostname() or time.monotonic() > deadline:
                    raise InUse(
                        f"{directory} is in use by {_describe(holder)}: wait for its end, or choose another directory"
                    )
                time.sleep(1)
            _sign(descriptor)
        except OSError as error:
            raise UserError(f"cannot write in {directory}: {error.strerror} ({_FILE})") from error
        # In case the caller forgets to release it.
        self.release = weakref.finalize(self, _release, path, descriptor, os.getpid())

    def __enter__(self) -> "Claim":
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def owned(directory: Path) -> contextlib.AbstractContextManager:
    """Claims the directory, creating it if needed; for a run of several processes, process 0 holds the claim."""
    if jax.process_index():
        return contextlib.nullcontext()
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write in {directory}: {error.strerror}") from error
    return Claim(directory)


def _locked(path: Path) -> int | None:
    """The descriptor of the locked file; None if another process holds it."""
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
                logging.warning("%s cannot be locked (%s): do not start a second run in it", path, error.strerror)
                return descriptor
            os.close(descriptor)
            raise
        os.close(descriptor)  # the holder has removed it since it was opened


def _sign(descriptor: int) -> None:
    since = datetime.datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    os.ftruncate(descriptor, 0)
    os.write(descriptor, json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": since}).encode())


def _holder(path: Path) -> dict[str, Any]:
    """The holder's entry; {} if it has not written it yet, or is gone."""
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
    if os.getpid() != owner:  # a fork of the holder is exiting
        return
    # Removed before it is unlocked: a process that locks it afterwards notices, and creates a new one.
    with contextlib.suppress(OSError):
        if os.path.samestat(os.fstat(descriptor), os.stat(path)):
            os.unlink(path)
    os.close(descriptor)
