"""The placement benchmark's own answers: every row on little memory, where ours and the ioctls must agree."""

from __future__ import annotations

import pytest

from pagecore.bench.place import GROUPS, Suite

pytestmark = pytest.mark.kernel


@pytest.fixture(scope="module")
def suite():
    suite = Suite(rounds=1, length=8 << 20)
    yield suite
    suite.close()


@pytest.mark.parametrize("group", GROUPS)
def test_ours_and_the_ioctls_agree(suite: Suite, group: str) -> None:
    # A row asserts that its contenders placed as many pages.
    rows = list(suite.rows(group))
    assert rows
    assert all(row.nanoseconds > 0 for row in rows)
