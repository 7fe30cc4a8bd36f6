"""Weft's own requests for images, as JSON, as files and as events."""
