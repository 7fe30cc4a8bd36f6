"""The live streams of a server: open sessions, and their counts."""

from __future__ import annotations

import uuid
from typing import Final

from server.api_keys import ApiKey
from server.errors import Overloaded
from server.service.service import Service
from server.service.stream import StreamSession
from server.service.stream_counts import SessionCounts, StreamCounts
from server.settings import Settings

__all__ = ["Streams"]

RETRY_AFTER_S: Final = 10.0


class Streams:
    """Opens sessions, at most as many at once as the operator allows.

    Args:
        service: service that plans their frames and has the engine.
        settings: settings with the limits of streams and of images.

    Attributes:
        counts: counts of all sessions.
        limits: limits of streams, set by the operator.
        sessions: open sessions, each with the API key that opened it.
    """

    def __init__(self, service: Service, settings: Settings) -> None:
        self.counts = StreamCounts()
        self._service = service
        self.limits = settings.streams
        self._image_limits = settings.limits
        self.sessions: dict[StreamSession, ApiKey | None] = {}

    def __len__(self) -> int:
        return len(self.sessions)

    async def until_stopping(self) -> None:
        """Wait until the server is about to stop, then raise.

        Raises:
            NotReady: the server is about to stop; the message is for the client.
        """
        await self._service.leaving.wait()
        self._service.ready_engine()

    def open(self, key: ApiKey | None = None) -> StreamSession:
        """Open a new session, which the caller must :meth:`close` in any case.

        Args:
            key: key of the client; None if the server has none.

        Raises:
            Overloaded: the maximum number of sessions is open.
            NotReady: the models are still loading, or the server is broken or about to stop.
        """
        self._service.ready_engine()
        self._check_room(key)
        session = StreamSession(
            self._service,
            self._image_limits,
            self.limits,
            SessionCounts(self.counts),
            f"stream-{uuid.uuid4().hex}",
        )
        self.sessions[session] = key
        self.counts.opened += 1
        return session

    def close(self, session: StreamSession) -> None:
        """End a session; its frames under way end at the engine's next tick."""
        self.sessions.pop(session, None)
        session.close()

    def _check_room(self, key: ApiKey | None) -> None:
        opened, limit = len(self.sessions), self.limits.sessions
        if opened >= limit:
            raise Overloaded(
                RETRY_AFTER_S, f"{opened} streams are open; at most {limit} are allowed."
            )
        own, limit = list(self.sessions.values()).count(key), self.limits.sessions_per_key
        if key is not None and limit is not None and own >= limit:
            raise Overloaded(
                RETRY_AFTER_S, f"{own} streams are open with this key; at most {limit} are allowed."
            )
