"""Data to run in, which the tests of one file share."""

import shutil

import pytest

from tests import tiny


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    tiny.make_data(folder)
    return folder


@pytest.fixture
def folder(data, tmp_path):
    """A copy of the data to run in."""
    return shutil.copytree(data, tmp_path / "run")
