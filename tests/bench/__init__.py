"""Benchmarks: each compares with a baseline in the same run and writes `build/bench/<name>.json`. They are no tests."""
