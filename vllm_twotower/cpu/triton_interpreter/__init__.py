"""A Triton backend named ``cpu`` that exists so that Triton's interpreter can be used where there is no GPU.

vLLM 0.32's supported model runner (V2) needs Triton. PyPI's Triton ships no CPU backend, so ``triton.runtime.driver``
finds no active driver there and vLLM falls back to its deprecated runner. With ``TRITON_INTERPRET=1`` no kernel is ever
compiled, so all that is missing is a driver that says "the device is the CPU". Inactive unless that variable is set,
and never where there is a GPU.

Being installed must not change anything for other models: without the variable the entry hides itself (``driver.py``).
"""
