"""Live streams, over a WebSocket and as events."""
