"""The planes of the destination, without a descriptor."""

import numpy as np
import pytest

from pagecore import PageState


def test_a_new_state_owes_everything():
    state = PageState(100)
    assert state.unsettled().tolist() == [[0, 100]]
    assert not state.settled().any()


def test_size_zero_is_legal():
    state = PageState(0)
    assert state.unsettled().shape == (0, 2)
    state.switch([], [])


def test_settled_is_received_or_released():
    state = PageState(64)
    state.received.set_range(0, 10)
    state.released.set_range(8, 10)
    assert state.settled().runs().tolist() == [[0, 18]]
    assert state.unsettled().tolist() == [[18, 46]]


def test_hinted_and_excluded_pages_are_no_debt():
    state = PageState(64)
    state.hinted.set_range(0, 32)
    state.excluded.set_range(32, 16)
    assert state.unsettled().tolist() == [[48, 16]]
    assert state.unsettled(fill_is_zero=False).tolist() == [[0, 32], [48, 16]]


def test_zero_is_marked_only_where_nothing_was_stored():
    """Design section 6: content in round 1, zero marked in round 2, switch, read: stale content."""
    state = PageState(64)
    state.store(10, 4)
    rewrite = state.store_zeros(8, 8)
    assert rewrite.tolist() == [[10, 4]], "pages that hold content are zeroed by the caller, not marked"
    assert state.zero.runs().tolist() == [[8, 2], [14, 2]]
    assert state.received.runs().tolist() == [[10, 4]]


def test_content_ends_a_zero_mark():
    state = PageState(64)
    state.store_zeros(0, 8)
    state.store(3, 1)
    assert state.zero.runs().tolist() == [[0, 3], [4, 4]]


def test_switch_keeps_received_pages_and_releases_zero_pages():
    state = PageState(64)
    state.store(0, 16)
    state.store_zeros(16, 16)
    state.switch([(8, 16), (32, 32)], [(40, 8)])
    assert state.received.runs().tolist() == [[0, 8]]
    assert state.claimed.runs().tolist() == [[0, 8]]
    assert state.released.runs().tolist() == [[24, 8]]
    assert state.hinted.runs().tolist() == [[40, 8]]
    assert state.zero.runs().tolist() == [[24, 8]]


def test_switch_refuses_a_page_that_nobody_sent():
    state = PageState(64)
    state.store(0, 10)
    with pytest.raises(ValueError, match="page 10 is not discarded but was never received"):
        state.switch([(11, 53)], [])
    assert state.received.runs().tolist() == [[0, 10]]
    assert not state.claimed.any()


def test_switch_refuses_a_hinted_page_that_was_not_discarded():
    state = PageState(64)
    state.store(0, 64)
    with pytest.raises(ValueError, match="page 5 is hinted but not discarded"):
        state.switch([(0, 5)], [(5, 1)])
    assert not state.hinted.any()


def test_unsettled_is_int64_pairs():
    runs = PageState(10).unsettled()
    assert runs.dtype == np.int64
    assert runs.shape == (1, 2)
