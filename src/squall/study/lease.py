"""Leases: many processes, on one machine or several with a shared disk, divide work and do none of it twice.

The leases of a piece of work are files `1`, `2`, ... in a folder of its own, and the one with the highest number
counts. A lease is taken by creating the next number, which a file system lets only one process do, and only if the
highest one is given back or dead. The number that counts never goes down while there is work, so a slow process that
judged an old lease dead gains nothing by creating a number below it.

A holder touches its lease every few seconds. Another process takes a lease for dead if it has not changed for a while,
measured by its own monotonic clock: no wall clock is compared, neither between machines nor with the file system's, so
clocks may differ and jump. On the same machine a lease is dead as soon as its process is.
"""

import contextlib
import errno
import json
import os
import secrets
import shutil
import socket
import threading
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from squall._process.documents import DocumentError, read_json
from squall._process.names import file_name

HEARTBEAT = 10.0
"""Seconds between two touches of a lease."""

EXPIRY = 120.0
"""Seconds without a change after which a lease of another machine is dead. NFS may show changes 60 seconds late."""

STARTED = 19
"""Of the words after a process's name in /proc/PID/stat, its start time: field 22 of proc(5)."""

NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)
"""What file systems without hard links answer."""


@dataclass
class Leases:
    """All leases of a study that this process holds or watches.

    Args:
        path: the folder for them; made when the first is taken.
        heartbeat: seconds between two touches.
        expiry: seconds without a change after which a lease of another machine is dead.
        held: the leases that this process holds, by the name of the work.
        taken: what was lost at the last heartbeat.
    """

    path: Path
    heartbeat: float = HEARTBEAT
    expiry: float = EXPIRY
    held: dict[str, Path] = field(default_factory=dict)
    taken: list[str] = field(default_factory=list)
    _seen: dict[str, tuple[object, float]] = field(default_factory=dict)

    def claim(self, name: str) -> bool:
        """Take the lease of a piece of work; False if another process holds it.

        Whoever gets it must then look whether the work is still to be done.
        """
        folder = self.path / file_name(name)
        top = _highest(folder)
        if top and not self._free(name, folder / str(top)):
            return False
        if not _create(folder, top + 1):
            return False
        if _highest(folder) > top + 1:  # the one judged dead was taken, and given back, meanwhile
            _remove(folder / str(top + 1))
            return False
        for number in _numbers(folder):
            if number <= top:
                _remove(folder / str(number))
        self._seen.pop(name, None)
        self.held[name] = folder / str(top + 1)
        return True

    def release(self, name: str, *, done: bool) -> None:
        """Give a lease back; of work that is done nothing remains."""
        lease = self.held.pop(name, None)
        if lease is None or _highest(lease.parent) != int(lease.name):
            return
        if done:
            shutil.rmtree(lease.parent, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                lease.write_text("{}", encoding="utf-8")

    def clear(self, name: str) -> None:
        """Remove the lease of work that is done, if a killed process left one."""
        if (self.path / file_name(name)).exists() and self.claim(name):
            self.release(name, done=True)

    @contextlib.contextmanager
    def waiting(self, name: str) -> Iterator[None]:
        """Hold a lease for the block, after whoever holds it now."""
        while not self.claim(name):
            time.sleep(min(1.0, self.heartbeat / 4))  # often enough to see every touch of the holder
        with self.beating():
            try:
                yield
            finally:
                self.release(name, done=True)

    def lost(self) -> list[str]:
        """Work that another process took over, as this one was suspended or cut off from the disk for too long."""
        return [
            name
            for name, lease in list(self.held.items())
            if (not lease.exists() or _highest(lease.parent) > int(lease.name))
            and self.held.get(name) is lease  # not given back meanwhile
        ]

    @contextlib.contextmanager
    def beating(self) -> Iterator[None]:
        """Touch what is held, in a thread, for the block."""
        end = threading.Event()
        thread = threading.Thread(target=self._beat, args=(end,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            end.set()
            thread.join()

    def _beat(self, end: threading.Event) -> None:
        while not end.wait(self.heartbeat):
            for lease in list(self.held.values()):
                with contextlib.suppress(OSError):  # of a disk that is away for a moment, or a lease that was lost
                    os.utime(lease)
            self.taken = self.lost()

    def _free(self, name: str, path: Path) -> bool:
        """Whether a lease is given back or dead."""
        try:
            text, changed = _read(path)
            holder = read_json(text)
        except FileNotFoundError:
            return False  # it was taken over or finished this moment
        except DocumentError:
            holder, text, changed = None, "", 0  # cut short by a full disk: dead unless it changes
        if holder == {}:
            return True
        if isinstance(holder, dict) and _ended(holder):
            return True
        state = (path.name, text, changed)
        before, since = self._seen.get(name, (None, 0.0))
        if state != before:
            self._seen[name] = state, _now()
            return False
        return _now() - since > self.expiry


def _now() -> float:
    """Seconds that pass also while the machine is suspended, where the system counts them, and never jump."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


def _numbers(folder: Path) -> list[int]:
    try:
        return [int(name) for name in os.listdir(folder) if name.isdecimal()]
    except FileNotFoundError:
        return []


def _highest(folder: Path) -> int:
    return max(_numbers(folder), default=0)


def _remove(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        path.unlink()


def _read(path: Path) -> tuple[str, int]:
    """Opened, not only asked for: NFS then looks at the server for what others wrote."""
    with path.open(encoding="utf-8", errors="replace") as file:
        return file.read(), os.fstat(file.fileno()).st_mtime_ns


def _create(folder: Path, number: int) -> bool:
    """A lease of this process, whole or not there; False if another process was faster."""
    folder.mkdir(parents=True, exist_ok=True)
    content = json.dumps({"token": secrets.token_hex(8), "host": socket.gethostname(), **_process(os.getpid())})
    part, target = folder / f".{secrets.token_hex(8)}.part", folder / str(number)
    try:
        # Not synced: a lease that a crash of the machine leaves empty is dead like its holder.
        part.write_text(content, encoding="utf-8")
        try:
            os.link(part, target)
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            warnings.warn(
                f"the file system of {folder} has no hard links: on a disk that several machines share, two of them "
                "may do the same run if it cannot create files exclusively either. The results are whole, and the same",
                stacklevel=4,
            )
            with os.fdopen(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "w") as file:
                file.write(content)
    except (FileExistsError, FileNotFoundError):  # the latter: whoever finished the work removed the folder
        return False
    finally:
        _remove(part)
    return True


def _process(pid: int) -> dict[str, object]:
    """What tells a process from all others on a Linux machine, in whatever container; else its number alone."""
    about: dict[str, object] = {"pid": pid}
    with contextlib.suppress(OSError, IndexError, ValueError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        about["machine"] = f"{boot} {os.readlink('/proc/self/ns/pid')}"
        about["started"] = _stat(pid)[STARTED]  # numbers of processes are used again
    return about


def _ended(holder: dict[str, object]) -> bool:
    """Whether a process of this machine has ended; unknown, so False, for those of others."""
    own, pid = _process(os.getpid()), holder.get("pid")
    if "machine" not in own or own["machine"] != holder.get("machine") or not isinstance(pid, int):
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:  # it is another user's
        return False
    with contextlib.suppress(OSError, IndexError):
        state, started = _stat(pid)[0], _stat(pid)[STARTED]
        return state == "Z" or started != holder.get("started")  # killed and not yet collected; or its number again
    return False


def _stat(pid: int) -> list[str]:
    """What Linux says of a process, after its name."""
    return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
