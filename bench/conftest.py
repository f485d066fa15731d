"""Options of `pytest bench/ --benchmark-only`."""

import pytest
from measure import parse_shape


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--bench-shape",
        type=parse_shape,
        action="append",
        metavar="N,D,F,K",
        help="may be repeated",
    )
