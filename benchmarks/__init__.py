"""Measurements of Weft beside its peers; each module prints one report."""
