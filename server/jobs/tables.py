"""The tables of the database, as the migrations create them."""

from __future__ import annotations

from typing import Final

from sqlalchemy import (
    JSON,
    BigInteger,
    Column,
    Double,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
)

__all__ = ["DELIVERIES", "JOBS", "METADATA"]

METADATA: Final = MetaData()

_COUNTED: Final = BigInteger().with_variant(Integer, "sqlite")
"""SQLite numbers rows automatically only in a column of exactly this type."""

JOBS: Final = Table(
    "weft_jobs",
    METADATA,
    Column("seq", _COUNTED, primary_key=True, autoincrement=True),
    Column("id", String(64), nullable=False, unique=True),
    Column("owner", String(64), nullable=False),
    Column("status", String(16), nullable=False),
    Column("input", JSON, nullable=False),
    Column("uploads", JSON, nullable=False),
    Column("digest", String(64), nullable=False),
    Column("idempotency_key", String(255)),
    Column("webhook", Text),
    Column("webhook_events", JSON, nullable=False),
    Column("attempt", Integer, nullable=False, default=0),
    Column("spared", Integer, nullable=False, default=0),
    Column("not_before", Double, nullable=False, default=0.0),
    Column("worker", String(64)),
    Column("lease_until", Double, nullable=False, default=0.0),
    Column("created_at", Double, nullable=False),
    Column("started_at", Double),
    Column("completed_at", Double),
    Column("expires_at", Double),
    Column("result", JSON(none_as_null=True)),
    Column("error", JSON(none_as_null=True)),
    UniqueConstraint("owner", "idempotency_key", name="weft_jobs_idempotency"),
    Index("weft_jobs_turns", "status", "owner", "seq"),
    Index("weft_jobs_expiry", "expires_at"),
)

DELIVERIES: Final = Table(
    "weft_deliveries",
    METADATA,
    Column("id", String(64), primary_key=True),
    Column("job", String(64), ForeignKey("weft_jobs.id", ondelete="CASCADE"), nullable=False),
    Column("event", String(16), nullable=False),
    Column("tries", Integer, nullable=False, default=0),
    Column("next_at", Double, nullable=False),
    Index("weft_deliveries_next", "next_at"),
)
