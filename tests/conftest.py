"""Options and fixtures that the tests share."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--reference-dir",
        metavar="DIR",
        help="check the golden numbers in DIR (searched recursively) instead of the copies in tests/reference",
    )
