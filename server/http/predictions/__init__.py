"""The API for durable jobs."""
