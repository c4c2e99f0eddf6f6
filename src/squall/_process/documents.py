"""Strict reading of YAML and JSON with plain values: whatever is ambiguous is an error."""

import json
import os
import re
from pathlib import Path
from typing import Any

import yaml

from squall._process.files import special_file

LARGEST_YAML = 2**20
"""Bytes: a larger file is data that was named by mistake, and slow to parse."""

DEEPEST, MOST_VALUES = 64, 20_000
"""Limits of a YAML document, every alias counted as what it stands for: far beyond any configuration."""

FLOAT = re.compile(
    r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|[0-9][0-9_]*(?=[eE])|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)
"""Numbers as YAML 1.2 writes them: `1e-3`, which PyYAML takes for text, is one."""

INTEGER = re.compile(r"[-+]?(?:0|[1-9][0-9_]*)|0x[0-9a-fA-F]+")
"""Without the octal and base-60 numbers of YAML 1.1, such as 010 and 1:30."""

BASE_60 = re.compile(r"[-+]?[0-9][0-9_]*(?::[0-5]?[0-9])+(?:\.[0-9_]*)?")
"""Numbers of YAML 1.1 such as 1:30, which is 90 there; `read_yaml` gives them as text."""

TAG = "tag:yaml.org,2002:"
PLAIN_TAGS = {TAG + name for name in ("str", "int", "float", "bool", "null", "map", "seq")}
"""All others would make objects, and are refused."""


class DocumentError(ValueError):
    """A document that cannot be read, or holds more than plain values."""


def read_text(path: Path | str) -> str:
    """The text of a file.

    Raises:
        DocumentError: if it is not a file, or not text in UTF-8.
        OSError: if it cannot be read.
    """
    if special := special_file(Path(path)):
        raise DocumentError(f"{path} is {special}, not a file")
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DocumentError(f"{path} is not a text file in UTF-8: {error}") from error


def load_yaml(path: Path | str) -> Any:
    """The values of a YAML file.

    Raises:
        DocumentError: as `read_text` and `read_yaml`, with the path.
    """
    if special_file(Path(path)) is None and os.path.getsize(path) > LARGEST_YAML:
        raise DocumentError(f"{path} has more than {LARGEST_YAML} bytes: it is not a configuration")
    text = read_text(path)
    try:
        return read_yaml(text)
    except DocumentError as error:
        raise DocumentError(f"{path}: {error}") from error


def read_yaml(text: str) -> Any:
    """The values of a YAML document: text, numbers, truth values, null, lists and mappings.

    Raises:
        DocumentError: for what is not YAML, a duplicate key, a date or another kind of value, and documents
            that contain themselves, are nested deeply or expand to very many values.

    >>> read_yaml("rate: 1e-3")
    {'rate': 0.001}
    >>> read_yaml("{a: 1, a: 2}")
    Traceback (most recent call last):
    ...
    squall._process.documents.DocumentError: line 1: the key 'a' stands twice, first in line 1: remove one of them
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise DocumentError(f"this is not YAML: {' '.join(str(error).split())}") from error
    except (RecursionError, OverflowError) as error:
        raise DocumentError(f"this cannot be read as YAML: {error}") from error
    except DocumentError:
        raise
    except ValueError as error:  # such as an integer of thousands of digits
        raise DocumentError(f"this cannot be read as YAML: {error}") from error


def dump_yaml(values: Any) -> str:
    """Plain values as YAML that `read_yaml` reads back as they are."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def read_json(text: str) -> Any:
    """The values of a JSON document.

    Raises:
        DocumentError: for what is not JSON, a duplicate key, deep nesting, and integers of thousands of digits.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise DocumentError(f"this cannot be read as JSON: {error}") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise DocumentError(f"the key '{next(x for x in names if names.count(x) > 1)}' stands twice")
    return values


class _Loader(yaml.SafeLoader):
    """Checks the nodes of a document before they become values."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._level = self._count = 0
        self._sizes: dict[int, tuple[int, int] | None] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._level, self._count = self._level + 1, self._count + 1
        if self._level > DEEPEST or self._count > MOST_VALUES:
            raise DocumentError(f"line {self.peek_event().start_mark.line + 1}: {_too_large()}")
        node = super().compose_node(parent, index)
        self._level -= 1
        return node

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None:
            self._measure(node)
        return node

    def _measure(self, node: yaml.Node) -> tuple[int, int]:
        """Number of values and depth of a node with its aliases expanded; checks keys and kinds on the way."""
        if id(node) in self._sizes:
            known = self._sizes[id(node)]
            if known is None:
                raise DocumentError(f"{_line(node)}: this contains itself")
            return known
        self._sizes[id(node)] = None
        children = self._children(node)
        sizes = [self._measure(child) for child in children]
        size = 1 + sum(count for count, _ in sizes), 1 + max((depth for _, depth in sizes), default=0)
        if size[0] > MOST_VALUES or size[1] > DEEPEST:
            raise DocumentError(f"{_line(node)}: {_too_large()}")
        self._sizes[id(node)] = size
        return size

    def _children(self, node: yaml.Node) -> list[yaml.Node]:
        if node.tag == TAG + "timestamp":
            raise DocumentError(f"{_line(node)}: {node.value} is read as a date: put it in quotes")
        if node.tag not in PLAIN_TAGS:
            tag = node.tag.removeprefix(TAG)
            raise DocumentError(f"{_line(node)}: '{tag}' is not allowed: text, numbers, lists and mappings are")
        if isinstance(node, yaml.SequenceNode):
            return node.value
        if not isinstance(node, yaml.MappingNode):
            return []
        first: dict[str, yaml.Node] = {}
        merged = [value for key, value in node.value if key.tag == TAG + "merge"]
        pairs = [(key, value) for key, value in node.value if key.tag != TAG + "merge"]
        for key, _ in pairs:
            if not isinstance(key, yaml.ScalarNode):
                raise DocumentError(f"{_line(key)}: a key must be one word, not a list or a mapping")
            if key.value in first:
                before = _line(first[key.value])
                raise DocumentError(
                    f"{_line(key)}: the key '{key.value}' stands twice, first in {before}: remove one of them"
                )
            first[key.value] = key
        return [*merged, *(node for pair in pairs for node in pair)]


class _Dumper(yaml.SafeDumper):
    """Quotes text that `_Loader` would take for a number."""


def _line(node: yaml.Node) -> str:
    return f"line {node.start_mark.line + 1}"


def _too_large() -> str:
    return f"this is nested deeper than {DEEPEST} levels or stands for more than {MOST_VALUES} values"


def _number_patterns() -> None:
    """Numbers as JSON and YAML 1.2 have them: 1e-3 is one; 1:30 (read as 90) and 010 (read as 8) are none."""
    kept = {
        sign: [(tag, pattern) for tag, pattern in patterns if tag not in (TAG + "int", TAG + "float", TAG + "value")]
        for sign, patterns in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    _Loader.yaml_implicit_resolvers = kept
    for tag, pattern in (("float", FLOAT), ("int", INTEGER)):
        whole = re.compile(f"^(?:{pattern.pattern})$")
        _Loader.add_implicit_resolver(TAG + tag, whole, list("-+0123456789."))
        _Dumper.add_implicit_resolver(TAG + tag, whole, list("-+0123456789."))


_number_patterns()
