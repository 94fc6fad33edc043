"""The parts of ``tools/gpu_smoke.py``; each runs in a process of its own."""
