"""Names from data and configurations as parts of paths."""

import difflib
import hashlib
import re
from collections.abc import Iterable

LONGEST = 120
"""Bytes: leaves room for endings in the 255 that file systems allow."""

UNSAFE = re.compile(r'[\x00-\x1f\x7f<>:"/\\|?*]|[. ]+$|^[. ]+')
"""Separators, drive letters, control characters, and names that hide or that Windows changes."""

RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)
"""Names of devices on Windows."""


def counted(count: int, thing: str) -> str:
    """A number with its noun.

    >>> counted(1, "seed"), counted(3, "seed")
    ('1 seed', '3 seeds')
    """
    return f"{count} {thing}{'' if count == 1 else 's'}"


def suggestion(word: str, known: Iterable[str]) -> str:
    """What to say of a word that is not among the known ones.

    >>> suggestion("hiden", ["hidden", "name"]), suggestion("x", ["hidden", "name"])
    ("did you mean 'hidden'? Known are hidden, name", 'known are hidden, name')
    """
    names = list(known)
    near = difflib.get_close_matches(word, names, n=1)
    there = f"nown are {', '.join(names) or 'none'}"
    return f"did you mean '{near[0]}'? K{there}" if near else f"k{there}"


def file_name(text: str) -> str:
    """A name as one part of a path: itself if it is safe on every system, else what is safe of it and a checksum.

    >>> file_name("cahn-hilliard, T = 0.1"), file_name("../../notes")
    ('cahn-hilliard, T = 0.1', 'notes-df16d059')
    """
    encoded = text.encode(errors="surrogatepass")
    safe = not UNSAFE.search(text) and not RESERVED.fullmatch(text) and text.isprintable()
    if safe and 0 < len(encoded) <= LONGEST:
        return text
    kept = encoded[: LONGEST - 9].decode(errors="ignore")
    words = re.sub(r"[^\w+-]+", "-", kept).strip("-")
    return "-".join(filter(None, [words, hashlib.sha256(encoded).hexdigest()[:8]]))
