"""What all tests of the scenario have."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import support
from openai import OpenAI
from service import GATEWAY
from testinfra.host import Host


@pytest.fixture(scope="session")
def gateway() -> Host:
    return support.host("gw")


@pytest.fixture(scope="module")
def api() -> Iterator[OpenAI]:
    """For all threads: each request says whose key it has."""
    with support.client(GATEWAY, key="none") as client:
        yield client
