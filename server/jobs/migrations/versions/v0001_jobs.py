"""Jobs and their webhooks."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Create the tables."""
    op.create_table(
        "weft_jobs",
        sa.Column(
            "seq",
            sa.BigInteger().with_variant(sa.Integer, "sqlite"),
            primary_key=True,
            autoincrement=True,
        ),
        sa.Column("id", sa.String(64), nullable=False, unique=True),
        sa.Column("owner", sa.String(64), nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("input", sa.JSON, nullable=False),
        sa.Column("uploads", sa.JSON, nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("idempotency_key", sa.String(255)),
        sa.Column("webhook", sa.Text),
        sa.Column("webhook_events", sa.JSON, nullable=False),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("spared", sa.Integer, nullable=False),
        sa.Column("not_before", sa.Double, nullable=False),
        sa.Column("worker", sa.String(64)),
        sa.Column("lease_until", sa.Double, nullable=False),
        sa.Column("created_at", sa.Double, nullable=False),
        sa.Column("started_at", sa.Double),
        sa.Column("completed_at", sa.Double),
        sa.Column("expires_at", sa.Double),
        sa.Column("result", sa.JSON),
        sa.Column("error", sa.JSON),
        sa.UniqueConstraint("owner", "idempotency_key", name="weft_jobs_idempotency"),
    )
    op.create_index("weft_jobs_turns", "weft_jobs", ["status", "owner", "seq"])
    op.create_index("weft_jobs_expiry", "weft_jobs", ["expires_at"])
    op.create_table(
        "weft_deliveries",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column(
            "job",
            sa.String(64),
            sa.ForeignKey("weft_jobs.id", ondelete="CASCADE"),
            nullable=False,
        ),
        sa.Column("event", sa.String(16), nullable=False),
        sa.Column("tries", sa.Integer, nullable=False),
        sa.Column("next_at", sa.Double, nullable=False),
    )
    op.create_index("weft_deliveries_next", "weft_deliveries", ["next_at"])


def downgrade() -> None:
    """Drop the tables, with all jobs."""
    op.drop_table("weft_deliveries")
    op.drop_table("weft_jobs")
