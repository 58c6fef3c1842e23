"""Fixtures that several test files share."""

import pathlib

import pytest

from cython_build import build


@pytest.fixture(scope="session")
def door(tmp_path_factory):
    """The test door into the placement loop, compiled once a session."""
    source = pathlib.Path(__file__).with_name("placement_door.pyx")
    return build(source, tmp_path_factory.mktemp("door"))
