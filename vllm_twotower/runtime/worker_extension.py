"""Methods added to every worker, called by name through ``collective_rpc``."""

from typing import Any

from vllm_twotower.runtime.trace import CanvasTrace


class DiffusionWorkerExtension:
    """vLLM mixes this class into its worker (``worker_extension_cls``)."""

    model_runner: Any

    def diffusion_stats(self, reset: bool = False) -> dict[str, int]:
        """The counters of this worker."""
        return self.model_runner.model_state.stats.take(reset)

    def diffusion_traffic(self) -> dict[str, int]:
        """What this rank has sent to the other tower's ranks; empty where the towers are not split."""
        return self.model_runner.model_state.report_traffic()

    def diffusion_trace_start(self) -> None:
        """Record canvases and verifications from now on."""
        state = self.model_runner.model_state
        state.trace = CanvasTrace(state.mask_token_id)

    def diffusion_trace_stop(self) -> None:
        """Record no more; what was not taken is dropped."""
        self.model_runner.model_state.trace = None

    def diffusion_trace_take(self) -> dict[str, list[dict[str, Any]]]:
        """What was recorded since the last call, by request id (``runtime.trace.CanvasTrace``)."""
        trace = self.model_runner.model_state.trace
        return trace.take() if trace is not None else {}
