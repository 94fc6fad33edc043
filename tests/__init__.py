"""Tests, and in ``harness`` what starts real engines and servers for tests, tools and benchmarks."""
