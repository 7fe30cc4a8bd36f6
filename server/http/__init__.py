"""The HTTP layer: one thin router per file."""
