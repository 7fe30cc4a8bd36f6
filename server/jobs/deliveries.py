"""Sends webhooks that are due, a few at once, and retries those that failed."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Final

from server.jobs import store
from server.jobs.database import Database
from server.jobs.job import Delivery, Job
from server.jobs.webhooks import Refused, send, signed

__all__ = ["Deliveries"]

log = logging.getLogger("weft")

AT_ONCE: Final = 8
LOOK_S: Final = 1.0
AGAIN_S: Final = (5.0, 30.0, 120.0, 600.0, 3600.0)
"""Seconds from each failed attempt to the next; after the last there is none."""

GONE: Final = 410
"""Status by which a receiver declines further webhooks."""


class Deliveries:
    """Takes webhooks from the database, where they stay until delivered or given up.

    Args:
        database: database with the jobs.
        secret: secret that signs webhooks.
        private: whether webhooks may go to private addresses.
        describe: function that makes the body of a webhook about a job.
    """

    def __init__(
        self, database: Database, secret: str, describe: Callable[[Job], bytes], *, private: bool
    ) -> None:
        self._database = database
        self._secret = secret
        self._describe = describe
        self._private = private

    async def run(self) -> None:
        """Send webhooks as they become due, until cancelled."""
        while True:
            due = await self._database.run(store.due, time.time(), AT_ONCE)
            await asyncio.gather(*map(self._deliver, due))
            if len(due) < AT_ONCE:
                await asyncio.sleep(LOOK_S)

    async def _deliver(self, delivery: Delivery) -> None:
        outcome = await self._sent(delivery)
        if outcome is None or delivery.tries >= len(AGAIN_S):
            again_at = None
        else:
            again_at = time.time() + AGAIN_S[delivery.tries]
        if outcome is not None:
            end = "given up" if again_at is None else "tried again later"
            log.warning("webhook of %s: %s; %s", delivery.job.id, outcome, end)
        await self._database.run(store.delivered, delivery, again_at)

    async def _sent(self, delivery: Delivery) -> str | None:
        """Send a webhook; return the reason if it failed, or None if nothing is left to do."""
        body = self._describe(delivery.job)
        headers = signed(self._secret, delivery.id, int(time.time()), body)
        url = delivery.job.webhook or ""
        try:
            status = await send(url, headers, body, private=self._private)
        except TimeoutError:
            return "no answer in time"
        except Refused as error:
            log.warning("webhook of %s: %s; given up", delivery.job.id, error)
            return None
        except (OSError, UnicodeError) as error:
            return type(error).__name__
        return None if 200 <= status < 300 or status == GONE else f"status {status}"
