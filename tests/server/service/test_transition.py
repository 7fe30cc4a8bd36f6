"""The prompt of each frame while one prompt replaces another."""

from __future__ import annotations

from server.models.blend import Blend
from server.service.transition import MAX_NESTING, Transition


def told(transition: Transition, frames: int) -> list[str | Blend]:
    found: list[str | Blend] = []
    for _ in range(frames):
        found.append(transition.prompt)
        transition = transition.onward()
    return found


def depth(one: str | Blend | None) -> int:
    return 1 + max(depth(part) for part, _ in one.parts) if isinstance(one, Blend) else 0


def test_a_change_moves_in_equal_shares_and_ends_with_the_target_alone() -> None:
    change = Transition("a").to("b", 4, "spherical")
    assert change.left == 4
    mixtures = [Blend((("a", 1 - s), ("b", s)), "spherical") for s in (0.25, 0.5, 0.75)]
    assert told(change, 6) == [*mixtures, "b", "b", "b"]


def test_a_change_over_no_frames_is_there_at_once() -> None:
    change = Transition("a").to("b", 0, "linear")
    assert told(change, 1) == ["b"]
    assert change.left == 0


def test_other_settings_leave_a_change_at_its_pace() -> None:
    change = Transition("a").to("b", 4, "linear").onward()
    assert change.to("b", 100, "spherical") is change


def test_a_change_of_mind_goes_on_from_what_the_last_frame_was_told() -> None:
    change = Transition("a").to("b", 4, "linear").onward()
    last = Blend((("a", 0.75), ("b", 0.25)))
    assert told(change.to("c", 2, "linear"), 2) == [Blend(((last, 0.5), ("c", 0.5))), "c"]


def test_a_change_of_mind_before_any_frame_starts_where_the_first_change_did() -> None:
    change = Transition("a").to("b", 4, "linear").to("c", 2, "linear")
    assert told(change, 1) == [Blend((("a", 0.5), ("c", 0.5)))]


def test_endless_changes_of_mind_do_not_nest_without_end() -> None:
    change = Transition("0")
    deepest = 0
    for k in range(1, 50):
        change = change.to(str(k), 10, "linear")
        deepest = max(deepest, depth(change.prompt))
        change = change.onward()
    assert deepest == MAX_NESTING + 1


def test_two_changes_of_mind_for_each_frame_do_not_nest_without_end_either() -> None:
    change = Transition("0")
    deepest = 0
    for k in range(1, 100, 2):
        change = change.to(str(k), 10, "linear").to(str(k + 1), 10, "linear")
        deepest = max(deepest, depth(change.prompt))
        change = change.onward()
    assert deepest == MAX_NESTING + 1


def test_a_change_that_is_complete_counts_no_more() -> None:
    change = Transition("a", "z", 1, done=1, nested=MAX_NESTING).to("b", 4, "linear").onward()
    last = Blend((("a", 0.75), ("b", 0.25)))
    assert change.to("c", 2, "linear").prompt == Blend(((last, 0.5), ("c", 0.5)))
