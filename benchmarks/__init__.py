"""Benchmarks: CPU time of one thread, ratios within one run. Not part of the installed package."""
