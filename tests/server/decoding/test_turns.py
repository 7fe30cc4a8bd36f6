"""Frames of streams do not wait behind uploads, and uploads do not wait forever."""

from __future__ import annotations

from server.decoding.turns import FRAMES_IN_A_ROW, DecodingTurns


def taken(turns: DecodingTurns[str]) -> list[str]:
    return list(iter(turns.next, None))


def test_a_frame_passes_all_uploads() -> None:
    turns = DecodingTurns[str]()
    for upload in ("first", "second"):
        turns.add(upload, frame=False)
    turns.add("frame", frame=True)
    assert taken(turns) == ["frame", "first", "second"]


def test_an_upload_waits_for_a_few_frames_at_most() -> None:
    turns = DecodingTurns[str]()
    # Frames for which no upload had to wait do not count.
    for _ in range(5):
        turns.add("frame", frame=True)
        turns.next()
    for number in range(2):
        turns.add(f"upload {number}", frame=False)
    for _ in range(2 * FRAMES_IN_A_ROW + 1):
        turns.add("frame", frame=True)
    a_while = FRAMES_IN_A_ROW * ["frame"]
    assert taken(turns) == [*a_while, "upload 0", *a_while, "upload 1", "frame"]


def test_what_was_withdrawn_gets_no_turn() -> None:
    turns = DecodingTurns[str]()
    turns.add("stays", frame=False)
    turns.add("leaves", frame=False)
    turns.withdraw("leaves")
    turns.withdraw("never waited")
    assert taken(turns) == ["stays"]
