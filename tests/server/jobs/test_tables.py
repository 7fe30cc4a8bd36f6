"""The migrations create the tables that the queries expect."""

from pathlib import Path

from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import create_engine

from server.jobs.database import of_folder
from server.jobs.tables import METADATA


def test_the_migrations_make_the_tables(tmp_path: Path) -> None:
    of_folder(tmp_path).close()
    with create_engine(f"sqlite:///{tmp_path / 'jobs.sqlite'}").connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), METADATA) == []
