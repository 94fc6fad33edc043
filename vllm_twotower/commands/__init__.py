"""The ``vllm-twotower`` command: demo, trace, inspect."""
