"""Weft's own API for images, as JSON, as files and as events."""
