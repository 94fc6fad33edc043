"""What starts real engines and servers for tests, benchmarks and ``tools/gpu_smoke.py``."""
