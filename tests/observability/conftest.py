"""A stack for the tests of a module, with a service in it that makes calls of every kind."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from stack import Stack, price_examples


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Every program running, and the service `cafe` at work for two tenants."""
    calls = (
        *("whole", "whole", "whole", "closed", "cut", "truncated", "lost", "lost", "abandoned", "refused"),
        *("tools", "deferred", "repeated"),
    )
    with (
        Stack(tmp_path_factory.mktemp("stack"), prices=price_examples()) as stack,
        stack.service("cafe", *calls, rounds=100_000, tenants="acme zeta"),
    ):
        yield stack
