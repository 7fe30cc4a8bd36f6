"""Soak test: whether a long time of unpleasant clients leaves anything behind in the server."""
