"""Uploaded pictures, decoded in processes of their own that a hostile file can at most waste."""
