"""Benchmarks: each contender is checked against float64 truth before it is timed; docs/performance.md has the
results.
"""
