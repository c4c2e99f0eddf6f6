"""Classes by their import path: from an installed package alone, or also from the working folder."""

import contextlib
import importlib
import importlib.machinery
import os
import site
import sys
import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import squall

__all__ = ["failed_in", "find_source", "importable", "imported", "is_installed"]


def is_installed(module: str) -> bool:
    """Whether a module is part of an installed package, found without importing it.

    An installed package lies in a folder of packages of this Python, or in one that such a folder names for it (an
    editable installation). The standard library is none: it holds no model.
    """
    top = module.split(".")[0]
    if not top.isidentifier() or top in sys.stdlib_module_names:
        return False
    spec = importlib.machinery.PathFinder.find_spec(top, [str(path) for path in _package_folders(top)])
    if spec is None or not (spec.origin or spec.submodule_search_locations):
        return False
    there = sys.modules.get(top)
    return there is None or _place(there.__spec__) == _place(spec)


def imported(path: str) -> Any:
    """What an import path such as my_package.MyModel names.

    Raises:
        ImportError, AttributeError, TypeError, ValueError: if there is nothing; the last two for a name such as '..x'.
    """
    module, _, name = path.rpartition(".")
    with importable(module):
        return getattr(importlib.import_module(module), name)


def importable(module: str) -> AbstractContextManager[None]:
    """For the import of a module: an installed one gets nothing from the working folder, others are found there too."""
    return _installed_only() if is_installed(module) else _working_folder_importable()


def find_source(module: str) -> Path | None:
    """The file of a module that an import from here would find; no package above it is imported."""
    parts = module.split(".")
    with _working_folder_importable():
        places: list[str] | None = None
        for depth, part in enumerate(parts, 1):
            name = ".".join(parts[:depth])
            if name in sys.modules:
                spec = sys.modules[name].__spec__
            else:
                spec = importlib.machinery.PathFinder.find_spec(part if places is None else name, places)
            if spec is None:
                return None
            places = list(spec.submodule_search_locations or ())
            if depth == len(parts):
                return Path(spec.origin) if spec.origin and os.path.isfile(spec.origin) else None
    return None


def failed_in(error: BaseException) -> str | None:
    """The file and line of code of the user's own that an error comes from, such as that of a model; else None."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    own = os.path.dirname(squall.__file__)
    packages = [own, *map(sysconfig.get_path, ("stdlib", "purelib", "platlib")), *map(str, _package_folders(""))]
    line, called = None, False
    for frame in traceback.extract_tb(error.__traceback__):
        called = called or frame.filename.startswith(own)  # frames before are of who called squall
        if called and os.path.isfile(frame.filename) and not frame.filename.startswith(tuple(packages)):
            line = f"{frame.filename}:{frame.lineno}"
    return line


@contextlib.contextmanager
def _working_folder_importable() -> Iterator[None]:
    """A module beside the data can be named, also by an installed command."""
    sys.path.insert(0, os.getcwd())
    try:
        yield
    finally:
        sys.path.pop(0)


@contextlib.contextmanager
def _installed_only() -> Iterator[None]:
    """Nothing is imported from the working folder, not even by an installed package."""
    before, here = sys.path[:], os.path.realpath(os.getcwd())
    kept = {os.path.realpath(path) for path in _package_folders("squall")}
    sys.path[:] = [path for path in before if path and (os.path.realpath(path) != here or here in kept)]
    try:
        yield
    finally:
        sys.path[:] = before


def _place(spec: importlib.machinery.ModuleSpec | None) -> list[str]:
    if spec is None:
        return []
    places = [spec.origin] if spec.origin else spec.submodule_search_locations or []
    return [os.path.realpath(path) for path in places]


def _package_folders(top: str) -> list[Path]:
    """Where packages are installed, and where squall itself is."""
    folders = [Path(path) for path in {*map(sysconfig.get_path, ("purelib", "platlib")), *site.getsitepackages()}]
    if site.ENABLE_USER_SITE:
        folders.append(Path(site.getusersitepackages()))
    linked = []
    for folder in folders:
        for file in sorted(folder.glob("*.pth")):
            with contextlib.suppress(OSError, UnicodeDecodeError):
                lines = file.read_text(encoding="utf-8").splitlines()
                linked += [folder / line for line in lines if line and not line.startswith(("#", "import"))]
    own = [Path(squall.__file__).parents[1]] if top == "squall" else []
    return [path for path in (*own, *folders, *linked) if path.is_dir()]
