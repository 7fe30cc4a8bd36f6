"""Blocks that are not compiled in time are given up, so that the compiled ones are used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from benchmarks.compiled_blocks import DeadlineCompiler

if TYPE_CHECKING:
    from collections.abc import Callable

    from server.models.compiling.program import BlockJob

JOB = cast("BlockJob", None)


class ByHand:
    """A compiler that compiles on the test's command."""

    def __init__(self) -> None:
        self.asked: dict[str, tuple[Callable[..., None], Callable[[], bool]]] = {}

    def ask(
        self, job: BlockJob, identity: str, on_done: Callable[..., None], wanted: Callable[[], bool]
    ) -> None:
        del job
        self.asked[identity] = on_done, wanted


def test_what_is_not_compiled_in_time_is_told_once_and_no_longer_wanted() -> None:
    by_hand, heard = ByHand(), list[tuple[str, Any]]()
    hurried = DeadlineCompiler(by_hand)
    for name in ("in time", "late"):
        hurried.ask(JOB, name, lambda *told, name=name: heard.append((name, told[0])))
    in_time, late = by_hand.asked["in time"], by_hand.asked["late"]
    in_time[0]([].append, "2 ms instead of 3")
    assert late[1]()
    assert hurried.stop() == 1
    assert not late[1]()
    late[0]([].append, "2 ms instead of 3")
    assert [(name, program is None) for name, program in heard] == [
        ("in time", False),
        ("late", True),
    ]
