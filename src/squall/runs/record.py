"""What a run folder says about itself, sealed at the training: edits are noticed, and one's own runs are known again.

The seal is a part of environment.json. Its checksum shows an edit. Where the model comes from a module of the working
folder, a signature shows that this user trained it on this machine: it is keyed by a secret in the user's state folder,
which is not in the run folder, and which nobody else can make.
"""

import contextlib
import hashlib
import hmac
import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from squall._process.documents import DocumentError, dump_yaml, read_yaml
from squall._process.files import sha256

SEAL = "record"
"""The key of environment.json that holds the record."""


def sealed(
    environment: Mapping[str, Any], config: Mapping[str, Any], normalization: Mapping[str, Any], source: Path | None
) -> dict[str, Any]:
    """The environment with its seal, over what config.yaml and normalization.json hold.

    `source` is the file of the model, where a module of the user's own defines it.
    """
    about = {"config": dump_yaml(dict(config)), "normalization": dict(normalization)}
    seal: dict[str, Any] = about | ({} if source is None else {"source": source_of(source)})
    result = {**environment, SEAL: seal}
    seal["checksum"] = _checksum(result)
    key = None if source is None else _key()
    if key is not None:
        seal["signature"] = _signature(key, seal["checksum"])
    return result


def recorded(environment: Mapping[str, Any]) -> dict[str, Any] | None:
    """The configuration and the normalisation at the training; None in folders of earlier versions."""
    seal = environment.get(SEAL)
    if seal is None:
        return None
    return {"config": read_yaml(seal["config"]), "normalization": seal["normalization"]}


def is_edited(environment: Mapping[str, Any]) -> bool:
    """Whether a sealed environment is not as it was written."""
    if SEAL not in environment:
        return False
    seal = environment[SEAL]
    try:
        return seal["checksum"] != _checksum(environment) or not isinstance(read_yaml(seal["config"]), dict)
    except (TypeError, KeyError, DocumentError, AttributeError):
        return True


def is_own(environment: Mapping[str, Any], source: Path | None) -> bool:
    """Whether this user trained the run, with this file of the model or one of the same content."""
    seal = environment.get(SEAL) or {}
    signature, known = seal.get("signature"), seal.get("source")
    if source is None or not isinstance(signature, str) or not isinstance(known, dict) or is_edited(environment):
        return False
    key, here = _key(), source_of(source)
    return (
        key is not None
        and hmac.compare_digest(signature.encode(), _signature(key, seal["checksum"]).encode())
        and any(known.get(name) == value for name, value in here.items())
    )


def source_of(path: Path) -> dict[str, str]:
    """A file by its place and its content."""
    return {"path": os.path.realpath(path), "sha256": sha256(path)}


def _checksum(environment: Mapping[str, Any]) -> str:
    about = {name: x for name, x in environment[SEAL].items() if name not in ("checksum", "signature")}
    text = json.dumps({**environment, SEAL: about}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _signature(key: bytes, checksum: str) -> str:
    return hmac.new(key, checksum.encode(), hashlib.sha256).hexdigest()


def _key() -> bytes | None:
    """The user's secret, made when it is first needed; None where there is no place for it."""
    with contextlib.suppress(OSError, RuntimeError):
        state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
        path = Path(state) / "squall" / "key"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)  # for this user alone, as the key
            part = path.with_name(f".{secrets.token_hex(8)}.part")
            try:
                # Beside, and linked: of two processes that make a key at once, both go on with the same.
                with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                    file.write(secrets.token_bytes(32))
                with contextlib.suppress(FileExistsError):
                    os.link(part, path)
            finally:
                part.unlink(missing_ok=True)
        key = path.read_bytes()
        return key if len(key) == 32 else None
    return None
