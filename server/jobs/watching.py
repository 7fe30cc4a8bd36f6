"""Watchers of jobs in this process, and the latest progress for each."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Generator
from contextlib import contextmanager, suppress

from server.service.generation import Progress

__all__ = ["Watch", "Watches"]


class Watch:
    """One watcher; a slow reader gets only the latest progress of each image."""

    def __init__(self) -> None:
        self._news: dict[int, Progress] = {}
        self._wake = asyncio.Event()

    def tell(self, progress: Progress | None) -> None:
        """Report progress, or that the job's status has changed."""
        if progress is not None:
            self._news[progress.index] = progress
        self._wake.set()

    async def news(self, within_s: float) -> list[Progress]:
        """Progress since the last call; waits up to `within_s` for some, or for another status."""
        with suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                await self._wake.wait()
        self._wake.clear()
        news, self._news = list(self._news.values()), {}
        return news


class Watches:
    """All watchers, by the job that they watch."""

    def __init__(self) -> None:
        self._watches: defaultdict[str, set[Watch]] = defaultdict(set)

    @contextmanager
    def on(self, identifier: str) -> Generator[Watch]:
        """Watch a job for the duration of the `with` block."""
        watch = Watch()
        self._watches[identifier].add(watch)
        try:
            yield watch
        finally:
            self._watches[identifier].discard(watch)
            if not self._watches[identifier]:
                del self._watches[identifier]

    def tell(self, identifier: str, progress: Progress | None = None) -> None:
        """Notify the watchers of a job of progress, or that its status has changed."""
        for watch in self._watches.get(identifier, ()):
            watch.tell(progress)

    def tell_all(self) -> None:
        """Make all watchers look again, because the server stops."""
        for identifier in list(self._watches):
            self.tell(identifier)
