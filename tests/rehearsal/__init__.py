"""A rehearsal of what a GPU user gets, on a machine without a GPU.

vLLM's own CUDA platform, configuration, scheduler, model runner and layers run as they would there, with a made-up GPU
under them: tensors on it have shapes and no memory (torch's fake tensors), kernels are noted down instead of launched.
So start-up decides what it would decide, and a step shows every launch, every transfer and every read.

| file | what |
| --- | --- |
| `gpu.py` | the GPUs that are made up, and `torch.cuda` for them |
| `operators.py` | vLLM's CUDA operators, declared as in its libraries, doing nothing |
| `flashinfer_kernels.py` | FlashInfer's Python as it is, and functions in the place of its kernels |
| `device.py` | the device: fake tensors, and a record of what happens to them |
| `engine.py` | an engine core and one rank's model runner on it |
| `passes.py` | the steps that are rehearsed |
| `report.py` | what is compared with the files in `golden/` |
| `kernels.py` | compiles the Triton kernels that were launched |
| `__main__.py` | `python -m tests.rehearsal`, one engine per process |
"""
