"""Benchmarks of speed and memory, one per file."""
