"""Changes of the database from version to version, which Alembic applies in their order."""
