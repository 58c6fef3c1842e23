"""What the package promises by name exists, is documented and is typed."""

import importlib
import inspect
import pathlib

import pytest

import pagecore

PACKAGES = [
    "pagecore",
    "pagecore.page_source",
    "pagecore.dirty_log",
    "pagecore.dirty_rate",
    "pagecore.testing",
    "pagecore.migrate",
    "pagecore.firecracker",
    "pagecore.snapshot_server",
    "pagecore.conformance",
]


@pytest.mark.parametrize("name", PACKAGES)
def test_every_exported_name_exists_and_is_documented(name):
    package = importlib.import_module(name)
    assert package.__all__ == sorted(package.__all__), "keep __all__ sorted"
    for exported in package.__all__:
        thing = getattr(package, exported)
        if inspect.isclass(thing) or callable(thing):
            assert (inspect.getdoc(thing) or "").strip(), f"{name}.{exported} has no docstring"


def test_every_extension_module_has_a_stub_and_a_typed_marker():
    root = pathlib.Path(pagecore.__file__).parent
    assert (root / "py.typed").exists()
    built = {path.name.split(".")[0]: path.parent for path in root.rglob("*.so")}
    assert built
    missing = [name for name, folder in built.items() if not (folder / f"{name}.pyi").exists()]
    assert not missing


def test_importing_sets_up_no_logging():
    import logging

    logger = logging.getLogger("pagecore")
    assert [type(handler) for handler in logger.handlers] == [logging.NullHandler]
    assert logger.level == logging.NOTSET
