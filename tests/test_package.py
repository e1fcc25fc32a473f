"""What the package promises as a package: its public names, its types, its licence, its layers."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
import tomllib
from importlib import metadata, resources
from pathlib import Path

import pytest

import edgeserve

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted(
    info.name for info in pkgutil.walk_packages(edgeserve.__path__, "edgeserve.") if "._examples" not in info.name and not info.ispkg
)
PACKAGES = sorted(info.name for info in pkgutil.walk_packages(edgeserve.__path__, "edgeserve.") if info.ispkg)


@pytest.mark.parametrize("name", ["edgeserve", *PACKAGES, *MODULES])
def test_all_is_a_tuple_of_names_that_exist(name: str) -> None:
    module = importlib.import_module(name)
    exported = getattr(module, "__all__", ())
    assert isinstance(exported, tuple), f"{name}.__all__ is a {type(exported).__name__}"
    assert len(set(exported)) == len(exported), f"{name}.__all__ names something twice"
    missing = [entry for entry in exported if not hasattr(module, entry)]
    assert not missing, f"{name}.__all__ names what is not there: {missing}"


@pytest.mark.parametrize("name", ["edgeserve", *PACKAGES, *MODULES])
def test_what_is_exported_is_documented(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__doc__, f"{name} has no docstring"
    for entry in getattr(module, "__all__", ()):
        exported = getattr(module, entry)
        if inspect.isclass(exported) or inspect.isfunction(exported):
            assert inspect.getdoc(exported), f"{name}.{entry} has no docstring"


@pytest.mark.parametrize("name", ["edgeserve", *PACKAGES, *MODULES])
def test_examples_in_docstrings_run(name: str) -> None:
    results = doctest.testmod(importlib.import_module(name))
    assert results.failed == 0


def test_types_are_shipped() -> None:
    assert resources.files("edgeserve").joinpath("py.typed").is_file()


def test_distribution_has_another_name_than_the_import() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["name"] == "edgeserve-streams"
    assert metadata.version("edgeserve-streams") == project["version"] == edgeserve.__version__


def test_licence_is_apache_2() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text and "Version 2.0, January 2004" in text and "END OF TERMS AND CONDITIONS" in text


def test_lock_names_the_default_index_only() -> None:
    """A lock file with another host in it installs for nobody else."""
    lock = tomllib.loads((ROOT / "uv.lock").read_text())
    for package in lock["package"]:
        source = package["source"]
        assert source in ({"registry": "https://pypi.org/simple"}, {"editable": "."}), f"{package['name']}: {source}"
        for wheel in package.get("wheels", []):
            assert wheel["url"].startswith("https://files.pythonhosted.org/"), wheel["url"]
