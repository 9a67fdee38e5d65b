"""Options and fixtures that the tests share."""

import os
from pathlib import Path

import pytest
from fake_slices import write_slice_set

os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton reads it when it is imported, which Lightning does


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--reference-dir",
        metavar="DIR",
        help="check the golden numbers in DIR (searched recursively) instead of the copies in tests/reference",
    )


@pytest.fixture(scope="session")
def slice_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real slice set of 8 fake patients, 16 px."""
    return write_slice_set(tmp_path_factory.mktemp("data") / "slices")
