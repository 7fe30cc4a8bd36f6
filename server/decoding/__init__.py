"""Decoding of uploaded pictures in separate processes, the most that a hostile file can harm."""
