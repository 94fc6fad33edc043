"""The compiler half of the backend, which Triton requires to be there and the interpreter never calls."""

from typing import Any

from triton.backends.compiler import BaseBackend


class InterpreterBackend(BaseBackend):
    """Accepts the ``cpu`` target and compiles nothing."""

    @staticmethod
    def supports_target(target: Any) -> bool:
        """Whether this is the backend for the target."""
        return target.backend == "cpu"

    def hash(self) -> str:
        """A constant: there is nothing whose change could make a compiled kernel stale."""
        return "vllm-twotower-interpreter"

    def _never(self, *args: Any) -> Any:
        raise NotImplementedError("the cpu Triton backend of vllm-twotower compiles nothing: set TRITON_INTERPRET=1")

    parse_options = add_stages = load_dialects = get_module_map = _never
