"""The window rules against their plain formulations."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megasparse.evaluation.windows import SlidingWindows, Window, continuation_window, rolling_windows


def hugging_face_rule(length: int, window: int, stride: int) -> list[tuple[int, int, list[int]]]:
    """(begin, end, positions whose label is kept and has a token before it), as the loop of that page goes."""
    rows, previous_end = [], 0
    for begin in range(0, length, stride):
        end = min(begin + window, length)
        kept = [position for position in range(begin, end) if position >= previous_end and position > begin]
        rows.append((begin, end, kept))
        previous_end = end
        if end == length:
            break
    return [row for row in rows if row[2]]


def spans(windows) -> list[tuple[int, int, list[int]]]:
    """The same from windows over the tokens 0, 1, 2, ..."""
    rows = []
    for window in windows:
        tokens = window.tokens.tolist()
        assert tokens == list(range(tokens[0], tokens[-1] + 1))
        rows.append((tokens[0], tokens[-1] + 1, tokens[window.first :]))
    return rows


@given(st.integers(2, 60), st.integers(2, 20), st.integers(1, 20))
def test_sliding_windows_follow_the_rule(length: int, window: int, stride: int) -> None:
    stride = min(stride, window)
    windows = SlidingWindows(np.arange(length), window, stride)
    found = spans(windows)
    assert found == hugging_face_rule(length, window, stride) and len(windows) == len(found)
    scored = [token for _, _, tokens in found for token in tokens]
    if stride < window:
        assert scored == list(range(1, length))
        # All but the first window give at least window - stride tokens of context.
        assert all(tokens[0] - begin >= window - stride for begin, _, tokens in found[1:])
    else:
        assert scored == [token for token in range(length) if token % window]


def test_windows_can_be_limited_and_end() -> None:
    windows = SlidingWindows(np.arange(100), 10, 5, limit=3)
    assert len(windows) == 3 and spans(windows)[-1] == (10, 20, list(range(15, 20)))
    assert len(SlidingWindows(np.arange(12), 10, 5, limit=9)) == 2
    with pytest.raises(IndexError):
        windows[3]


def test_continuations_keep_the_end_of_a_long_context() -> None:
    window = continuation_window([1, 2, 3], [4, 5], seq_length=8)
    assert window.tokens.tolist() == [1, 2, 3, 4, 5] and window.first == 3 and window.num_scored == 2
    window = continuation_window(list(range(20)), [90, 91], seq_length=4)
    assert window.tokens.tolist() == [17, 18, 19, 90, 91] and window.num_scored == 2
    whole = continuation_window([7], [1, 2, 3, 4], seq_length=4)
    assert whole.tokens.tolist() == [7, 1, 2, 3, 4] and whole.first == 1
    with pytest.raises(AssertionError):
        continuation_window([7], [1, 2, 3, 4, 5], seq_length=4)


@given(st.integers(0, 40), st.integers(1, 12))
def test_rolling_windows_score_every_token_once(length: int, seq_length: int) -> None:
    windows = rolling_windows(list(range(100, 100 + length)), 7, seq_length)
    assert [token for w in windows for token in w.tokens[w.first :].tolist()] == list(range(100, 100 + length))
    assert all(1 <= w.first and len(w.tokens) <= seq_length + 1 for w in windows)
    if length > seq_length:
        # The last one is full, whatever is left for it to score.
        assert len(windows[-1].tokens) == seq_length + 1
    assert not windows or (windows[0].tokens[0] == 7 and windows[0].first == 1)


def test_a_window_counts_what_it_scores() -> None:
    assert Window(np.arange(9), 4).num_scored == 5
