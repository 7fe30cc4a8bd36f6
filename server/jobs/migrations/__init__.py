"""Schema changes of the database from version to version, applied in order by Alembic."""
