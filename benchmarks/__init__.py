"""Benchmarks of Weft and of other systems; each module prints one report."""
