"""Scheduler, model state and sampler: the only code that knows ``vllm.v1``."""
