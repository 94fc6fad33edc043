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

    def parse_options(self, options: dict) -> Any:
        """Never reached under the interpreter."""
        raise NotImplementedError("the cpu Triton backend of vllm-twotower compiles nothing: set TRITON_INTERPRET=1")

    def add_stages(self, stages: dict, options: Any, *args: Any) -> None:
        """Never reached under the interpreter."""
        raise NotImplementedError("the cpu Triton backend of vllm-twotower compiles nothing: set TRITON_INTERPRET=1")

    def load_dialects(self, context: Any) -> None:
        """No dialects."""

    def get_module_map(self) -> dict:
        """No library modules to substitute."""
        return {}

    def get_codegen_implementation(self, *args: Any) -> dict:
        """No code generation."""
        return {}

    def pack_metadata(self, metadata: Any) -> Any:
        """Unchanged."""
        return metadata
