"""The server: HTTP at its edge, the step-batching engine at its heart."""
