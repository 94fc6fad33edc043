"""Benchmarks; each says at its top what it measures."""
