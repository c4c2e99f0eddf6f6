"""A run folder: what a run leaves on disk, and how it is read back.

    config.yaml         the resolved configuration
    environment.json    versions, device, data, seed
    normalization.json  of the fields
    data.json           fields, units, axes and conditions of the data; data.npz, the arrays to it
    sampling.npz        stiffness index of the training transitions, where they are not drawn uniformly
    metrics.jsonl       one line per logged step
    checkpoints/        last-<step>/ and best-<step>/, two of each, with their checksums
    evaluation.json     the errors, and rollouts.npz, the fields for its figures
    figures/

Every file is written beside and renamed into place, so that a kill leaves the old one or the new one.
"""

import contextlib
import errno
import functools
import hashlib
import io
import json
import os
import shutil
import stat
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Shaped
from safetensors.torch import load, load_file, save
from torch import nn

from squall._process.documents import DocumentError, dump_yaml, load_yaml, read_json, read_text
from squall._process.files import DAMAGED_ARRAYS, sha256, special_file, write_beside, write_folder_beside, write_text
from squall._process.messages import first_line
from squall.data import Normalization
from squall.runs.config import difference, flat
from squall.runs.record import is_edited, recorded
from squall.training.loop import Checkpoint
from squall.training.state import load_state, split_state

Kind = Literal["last", "best"]

KINDS: tuple[Kind, ...] = ("best", "last")
"""The best first: it is what an evaluation would choose."""

WEIGHTS, STATE, CHECKSUMS = "weights.safetensors", "state.pt", "checksums.json"

FINGERPRINT_BLOCKS, FINGERPRINT_BLOCK = 256, 2**20
"""Up to 256 MiB every byte counts; of more, 256 blocks of 1 MiB are read, however large the data are."""

SAMPLING = "sampling.npz"
"""Written for the report of a study, which shows what a sampler picks."""

CHECKPOINTS = "checkpoints"

KEPT = 2
"""Checkpoints of each kind that are kept: the newest, and the one before in case it is damaged."""


class RunFolderError(ValueError):
    """A folder that is not a run folder, or not the expected one."""


class DamagedCheckpointWarning(UserWarning):
    """A checkpoint is damaged, and the one before it is used."""


class CheckpointError(RunFolderError):
    """No checkpoint of a run can be read."""


def fingerprint(path: Path | str) -> dict[str, Any]:
    """Size and checksum of a file, or of all files in a folder; over 256 MiB, of 256 blocks spread over the content."""
    folder = Path(path)
    if not folder.is_dir():
        status = folder.stat()
        return {"bytes": status.st_size, "sha256": _checksum(folder, ((".", status.st_size, status.st_mtime_ns),))}
    files = tuple(_files_below(folder))
    size = sum(size for _, size, _ in files)
    return {"files": len(files), "bytes": size, "sha256": _checksum(folder, files)}


def _files_below(folder: Path) -> Iterator[tuple[str, int, int]]:
    """Name, size and time of change of every file in a folder, in the order of the names."""
    for parent, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            path = Path(parent, name)
            status = path.stat()
            if stat.S_ISREG(status.st_mode):
                yield path.relative_to(folder).as_posix(), status.st_size, status.st_mtime_ns


@functools.lru_cache(maxsize=8)  # the runs of a study share a few files, and each asks several times
def _checksum(path: Path, files: tuple[tuple[str, int, int], ...]) -> str:
    """Of what has not changed since it was last read here: `path / name` for every name, size and time of change."""
    digest = hashlib.sha256()
    every = max(FINGERPRINT_BLOCK, sum(size for _, size, _ in files) // FINGERPRINT_BLOCKS)
    start = 0  # of a file, if all were one after the other
    for name, size, _ in files:
        if name != ".":
            digest.update(f"{name}\0{size}\0".encode(errors="surrogateescape"))
        with (path / name).open("rb") as file:
            for offset in range(0 if every == FINGERPRINT_BLOCK else -start % every, size, every):
                file.seek(offset)
                digest.update(file.read(FINGERPRINT_BLOCK))
        start += size
    return digest.hexdigest()


def evaluation_suffix(method: str | None, count: int) -> str:
    """What sets the files of an evaluation by another integrator apart."""
    if method is None and count == 1:
        return ""
    return f"-{method or 'same'}-{count}"


class RunFolder:
    """One run on disk; `create` makes the folder."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    def create(self) -> None:
        """Make the folder and its parents."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except (NotADirectoryError, FileExistsError) as error:
            raise RunFolderError(f"{self.path} cannot be a run folder: a file of that name is in the way") from error

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder against a second process that would write into it.

        Raises:
            RunFolderError: if another process holds it. The lock goes with its process, however that ends.
        """
        try:
            import fcntl
        except ImportError:  # no advisory locks on this system
            yield
            return
        # Neither through a link nor waiting for a pipe, and never emptied: the folder may be a stranger's.
        lock = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        with os.fdopen(lock, "rb"):
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EAGAIN, errno.EACCES):
                    message = f"another process is writing into {self.path}: wait for it, or stop it"
                    raise RunFolderError(message) from None
                warnings.warn(
                    f"the file system of {self.path} has no locks ({error.strerror}): nothing else may write there now",
                    stacklevel=3,
                )
            yield

    # Text files

    def has(self, name: str) -> bool:
        """Whether the folder holds a file of that name."""
        return (self.path / name).exists()

    def write_config(self, config: dict[str, Any]) -> None:
        write_text(self.path / "config.yaml", dump_yaml(config))

    def read_config(self) -> dict[str, Any]:
        """The resolved configuration.

        Raises:
            RunFolderError: if the folder has none.
        """
        path = self.path / "config.yaml"
        if not path.exists():
            raise RunFolderError(f"{self.path} is not a run folder: it has no config.yaml. `squall train` makes one")
        try:
            values = _mapping(load_yaml(path), path)
        except DocumentError as error:
            raise RunFolderError(f"{error}: it is damaged, or was edited") from error
        self._refuse_edited(values)
        return values

    def _refuse_edited(self, config: dict[str, Any]) -> None:
        """What the folder says about itself is what it said when the run was trained."""
        if not self.has("environment.json"):
            return
        environment = self.read_json("environment.json")
        if is_edited(environment):
            raise RunFolderError(
                f"{self.path / 'environment.json'} was edited after the training: its checksum does not match. Bring "
                "the file back, or train the run again"
            )
        before = recorded(environment)
        lines = [] if before is None else difference(before["config"], config)
        # A kill between the two files of a run that goes on leaves the steps of an earlier segment.
        earlier = {segment["steps"] for segment in environment.get("segments", ())}
        if flat(config).get("training.steps") in earlier:
            lines = [line for line in lines if not line.startswith("training.steps:")]
        if lines:
            raise RunFolderError(
                f"{self.path / 'config.yaml'} was edited after the training (trained -> there now):\n  "
                + "\n  ".join(lines)
                + "\nBring the values back, or train another run"
            )

    def read_normalization(self) -> Normalization:
        """The normalisation of the training.

        Raises:
            RunFolderError: if it is damaged, or was edited.
        """
        values = self.read_json("normalization.json")
        before = recorded(self.read_json("environment.json"))
        if before is not None and before["normalization"] != values:
            raise RunFolderError(
                f"{self.path / 'normalization.json'} was edited after the training: it holds {values}, but the run was "
                f"trained with {before['normalization']}"
            )
        try:
            return Normalization.from_dict(values)
        except (TypeError, ValueError) as error:
            raise RunFolderError(f"{self.path / 'normalization.json'} is damaged: {error}") from error

    def write_json(self, name: str, values: dict[str, Any]) -> None:
        """Write a JSON file; a number that is not finite becomes null."""
        write_text(self.path / name, json.dumps(_finite(values), indent=1, allow_nan=False) + "\n")

    def read_json(self, name: str) -> dict[str, Any]:
        path = self.path / name
        try:
            return _Recorded.of(_mapping(read_json(read_text(path)), path), path)
        except FileNotFoundError:
            raise RunFolderError(f"{self.path} has no {name}") from None
        except DocumentError as error:
            raise RunFolderError(f"{path} is damaged: {error}") from error

    def write_arrays(self, name: str, **arrays: Shaped[np.ndarray, "..."]) -> None:
        with write_beside(self.path / name) as part, part.open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, **arrays)

    def read_arrays(self, name: str) -> dict[str, Shaped[np.ndarray, "..."]]:
        path = self.path / name
        if special := special_file(path):
            raise RunFolderError(f"{path} is {special}, not a file")
        try:
            with np.load(path, allow_pickle=False) as file:
                return dict(file)
        except DAMAGED_ARRAYS as error:
            raise RunFolderError(f"{path} is damaged: {error}. Evaluate the run again") from error

    # Metrics

    def append_metrics(self, line: dict[str, Any]) -> None:
        """Add one line to metrics.jsonl, flushed."""
        with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(_finite(line), allow_nan=False) + "\n")

    def read_metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl; what is no line of it, as a last one that a kill cut short, is left out."""
        path = self.path / "metrics.jsonl"
        if not path.exists():
            return []
        lines = []
        for text in read_text(path).splitlines():
            with contextlib.suppress(DocumentError):
                line = read_json(text)
                if isinstance(line, dict) and isinstance(line.get("step"), int):
                    lines.append(line)
        return lines

    def rewind_metrics(self, step: int) -> None:
        """Take back the lines after `step`, which a resumed training writes again."""
        kept = [line for line in self.read_metrics() if line["step"] <= step]
        write_text(self.path / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in kept))

    # Checkpoints

    def save(self, kind: Kind, checkpoint: Checkpoint) -> None:
        """Write a checkpoint beside, rename it into place, and drop those that are older than the one before."""
        # Turned into bytes first: a full disk is then an OSError, which torch.save and safetensors hide.
        contents = {WEIGHTS: save(checkpoint.weights), STATE: _state_bytes(checkpoint.state)}
        checksums = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
        contents[CHECKSUMS] = json.dumps(checksums).encode()
        write_folder_beside(self._checkpoint_path(kind, checkpoint.step), contents)
        for step in self.checkpoint_steps(kind)[KEPT:]:
            shutil.rmtree(self._checkpoint_path(kind, step), ignore_errors=True)

    def checkpoint_steps(self, kind: Kind) -> list[int]:
        """The steps of the checkpoints of a kind, the newest first."""
        names = (path.name.removeprefix(f"{kind}-") for path in (self.path / CHECKPOINTS).glob(f"{kind}-*"))
        return sorted((int(step) for step in names if step.isdecimal()), reverse=True)

    def load(self, kind: Kind, fits: Callable[[Checkpoint], None] = lambda checkpoint: None) -> Checkpoint | None:
        """The newest checkpoint that can be read, None if there is none yet.

        A damaged one is passed over with a warning that names it.

        Args:
            kind: the last or the best.
            fits: raises where a checkpoint, though whole, is not one of this run.

        Raises:
            CheckpointError: if there are some and none can be read.
        """
        steps = self.checkpoint_steps(kind)
        for step in steps:
            path = self._checkpoint_path(kind, step)
            try:
                checkpoint = _read_checkpoint(path, step)
                try:
                    fits(checkpoint)
                except Exception as error:  # such as shapes that differ, or a state of another kind
                    message = f"the checkpoint {path} is damaged (it does not fit the model: {first_line(error)})"
                    raise CheckpointError(message) from error
                return checkpoint
            except CheckpointError as error:
                warnings.warn(f"{error}: the checkpoint before it is used", DamagedCheckpointWarning, stacklevel=2)
        if steps:
            raise CheckpointError(
                f"no '{kind}' checkpoint of {self.path} can be read: those of the steps {steps} are damaged. Move "
                f"{self.path / 'checkpoints'}/{kind}-* elsewhere to go on without them"
            )
        return None

    def newest(
        self, kinds: Sequence[Kind] = KINDS, fits: Callable[[Checkpoint], None] = lambda checkpoint: None
    ) -> tuple[Kind, Checkpoint]:
        """The newest checkpoint of the first of some kinds that has one, with its kind.

        Raises:
            CheckpointError: if there is none, or none can be read.
        """
        for kind in kinds:
            try:
                if checkpoint := self.load(kind, fits):
                    return kind, checkpoint
            except CheckpointError as error:
                if kind == kinds[-1]:
                    raise
                warnings.warn(f"{error}; the last one is used", DamagedCheckpointWarning, stacklevel=2)
        which = "checkpoint yet" if len(kinds) > 1 else f"'{kinds[0]}' checkpoint"
        raise CheckpointError(f"{self.path} has no {which}: train it with `squall train` first")

    def weights_checksum(self, kind: Kind, step: int) -> str:
        """SHA-256 of the weights of a checkpoint."""
        return sha256(self._checkpoint_path(kind, step) / WEIGHTS)

    def _checkpoint_path(self, kind: Kind, step: int) -> Path:
        return self.path / CHECKPOINTS / f"{kind}-{step:08d}"


class _Recorded(dict[str, Any]):
    """What a JSON file of a run folder holds, which may be damaged: a key that is missing is an error that names it."""

    path = Path()

    @classmethod
    def of(cls, value: Any, path: Path) -> Any:
        if isinstance(value, list):
            return [cls.of(x, path) for x in value] if any(isinstance(x, dict | list) for x in value) else value
        if not isinstance(value, dict):
            return value
        recorded = cls((name, cls.of(x, path)) for name, x in value.items())
        recorded.path = path
        return recorded

    def __missing__(self, name: str) -> Any:
        raise RunFolderError(f"{self.path} is damaged: it has no '{name}'")


def _mapping(values: Any, path: Path) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise RunFolderError(f"{path} is damaged: it holds a {type(values).__name__} instead of names and values")
    return values


def _read_checkpoint(path: Path, step: int) -> Checkpoint:
    try:
        checksums = _mapping(read_json(read_text(path / CHECKSUMS)), path / CHECKSUMS)
        special = [f"{name} is {what}" for name in (WEIGHTS, STATE) if (what := special_file(path / name))]
        damaged = special or [
            f"{name} does not match its checksum" for name in (WEIGHTS, STATE) if sha256(path / name) != checksums[name]
        ]
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"the checkpoint {path} is damaged ({error})") from error
    if damaged:
        raise CheckpointError(f"the checkpoint {path} is damaged ({damaged[0]})")
    try:
        state = torch.load(path / STATE, weights_only=True)
        if not isinstance(state, dict) or not isinstance(state.get("extra", {}), dict):
            raise TypeError(f"{STATE} holds a {type(state).__name__}")
        return Checkpoint(step, load_file(path / WEIGHTS), state)
    except Exception as error:  # of the readers of torch and safetensors, which know each its own
        raise CheckpointError(f"the checkpoint {path} is damaged ({first_line(error)})") from error


def refuse_unsavable(model: nn.Module) -> None:
    """Save and load a model's state once in memory, before anything is trained.

    Raises:
        CheckpointError: if it does not come back.
    """
    try:
        weights, extra = split_state(model.state_dict())
        state = torch.load(io.BytesIO(_state_bytes({"extra": extra})), weights_only=True)
        load_state(model, Checkpoint(0, load(save(weights)), state).model_state)
    except Exception as error:  # the model's own methods are called
        reason = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(
            f"the model cannot be saved and loaded again, so nothing was trained: {reason}. Its state dict "
            "may hold tensors, numbers, text, lists and mappings"
        ) from error


def _state_bytes(state: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def _finite(value: Any) -> Any:
    """The value with every number that is not finite replaced by None: JSON has no word for it."""
    if isinstance(value, dict):
        return {name: _finite(x) for name, x in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(x) for x in value]
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value
