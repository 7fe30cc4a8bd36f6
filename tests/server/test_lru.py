"""A cache is bounded by the bytes of what it keeps."""

from server.lru import ByteBoundedLRU


def test_the_least_recently_used_goes_first() -> None:
    made: list[str] = []
    kept: ByteBoundedLRU[str, bytes] = ByteBoundedLRU(10, len)

    def get(key: str, size: int = 4) -> bytes:
        def make() -> bytes:
            made.append(key)
            return bytes(size)

        return kept.get(key, make)

    assert len(get("a")) == 4
    get("b")
    get("a")
    get("c")
    assert kept.bytes == 8
    get("a")
    assert made == ["a", "b", "c"]
    get("b")
    assert made == ["a", "b", "c", "b"]
    assert kept.bytes == 8


def test_what_is_too_large_by_itself_is_made_each_time() -> None:
    kept: ByteBoundedLRU[str, bytes] = ByteBoundedLRU(10, len)
    kept.get("b", lambda: bytes(6))
    assert len(kept.get("a", lambda: bytes(11))) == 11
    assert kept.find("b") is not None, "it was to push nothing out"
    assert kept.bytes == 6
    assert len(kept.get("a", lambda: bytes(3))) == 3


def test_two_who_make_the_same_count_it_once() -> None:
    kept: ByteBoundedLRU[str, bytes] = ByteBoundedLRU(10, len)

    def slow() -> bytes:
        kept.get("a", lambda: bytes(3))
        return bytes(3)

    kept.get("a", slow)
    assert kept.bytes == 3
