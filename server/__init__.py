"""The server: an HTTP front end and the step-batching engine."""
