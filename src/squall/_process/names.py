"""Names from data and configurations as parts of paths."""

import hashlib
import re

LONGEST = 120
"""Bytes: leaves room for endings in the 255 that file systems allow."""

UNSAFE = re.compile(r'[\x00-\x1f\x7f<>:"/\\|?*]|[. ]+$|^[. ]+')
"""Separators, drive letters, control characters, and names that hide or that Windows changes."""

RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)
"""Names of devices on Windows."""


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
