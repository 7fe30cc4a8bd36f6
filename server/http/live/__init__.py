"""Live streams, over a socket and as events."""
