"""`module:name` and `file.py:name`: what a YAML file names of Python."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from edgeserve.pipeline.declared import did_you_mean
from edgeserve.pipeline.errors import BadReference, Where

PATTERN = r"^[^:]+:[^:\d\W]\w*(\.[^\d\W]\w*)*$"
"""How a reference looks."""


def load_file(path: Path) -> ModuleType:
    """Runs a Python file as a module of its own name, with its directory first on the path, as `python app.py` would."""
    for module in list(sys.modules.values()):
        if getattr(module, "__file__", None) == str(path):
            return module
    _look_first(path.parent)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    before = sys.modules.get(path.stem)
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        sys.modules.pop(path.stem, None)
        if before is not None:
            sys.modules[path.stem] = before
        raise
    return module


def resolve(reference: str, folder: Path, where: Where) -> Any:
    """What a reference names. Files are looked for beside the YAML file.

    Raises:
        BadReference: it names nothing, or its module cannot be imported.
    """
    home, _, name = reference.rpartition(":")
    if not home or not name:
        raise BadReference(f"{reference!r} is no reference", where, "write 'module:name', or 'file.py:name' for a file beside this one")
    found: Any = _module(home, folder, where)
    for part in name.split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            public = [each for each in dir(found) if not each.startswith("_")]
            hint = did_you_mean(part, public, "correct the name behind the colon")
            raise BadReference(f"{reference!r}: {home} has no {part!r}", where, hint) from None
    return found


def _module(home: str, folder: Path, where: Where) -> ModuleType:
    if home.endswith(".py"):
        path = (folder / home).resolve()
        if not path.is_file():
            near = [str(each.relative_to(folder)) for each in folder.glob("*.py")]
            raise BadReference(f"there is no file {home!r}", where, did_you_mean(home, near, f"put it into {folder}"))
        return _run(home, where, lambda: load_file(path))
    _look_first(folder)
    return _run(home, where, lambda: importlib.import_module(home))


def _look_first(folder: Path) -> None:
    if sys.path[:1] != [str(folder)]:
        sys.path.insert(0, str(folder))


def _run(home: str, where: Where, load: Any) -> ModuleType:
    try:
        module: ModuleType = load()
    except ModuleNotFoundError as exc:
        there = exc.name is not None and (exc.name == home or home.startswith(exc.name + "."))
        reason = f"there is no module {home!r}" if there else f"{home} cannot be imported: {exc}"
        raise BadReference(reason, where, "install it, or write 'file.py:name' for a file beside this one") from exc
    except Exception as exc:
        raise BadReference(
            f"{home} cannot be imported: {type(exc).__name__}: {exc}", where, "correct it: python must be able to run it"
        ) from exc
    return module


__all__ = ("PATTERN", "load_file", "resolve")
