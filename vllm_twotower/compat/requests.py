"""Shims of requests on their way in and out of vLLM's front end."""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from vllm_twotower.compat.wrapping import find_argument, wrap
from vllm_twotower.config import REQUEST_PREFIX, EngineOptions
from vllm_twotower.core import Mode

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.input_processor import InputProcessor


@contextlib.contextmanager
def _as_validation_error() -> Iterator[None]:
    """Turn a ``ValueError`` into what vLLM answers with a 400."""
    from vllm.exceptions import VLLMValidationError

    try:
        yield
    except ValueError as problem:
        raise VLLMValidationError(str(problem)) from problem


@functools.cache
def check_requests(architecture: str, check_params: Callable[..., None], check_request: Callable[..., None]) -> None:
    """A ``ValueError`` of our checks refuses a request of our architecture with a 400.

    Symptom: vLLM's own hook, ``LogitsProcessor.validate_params``, is given neither the engine's options nor the prompt,
        nor what vLLM fills in.
    Upstream: vllm.v1.engine.input_processor.InputProcessor.process_inputs,
        vllm.v1.engine.input_processor.InputProcessor.vllm_config, vllm.exceptions.VLLMValidationError
    Removed when: an architecture can bring an admission check that sees the configuration and the prompt.
    Test: tests/test_admission.py::test_every_way_into_the_engine_is_checked

    Args:
        architecture: ours; requests for others are not looked at.
        check_params: gets the client's ``SamplingParams``, the engine's options and the ``VllmConfig``, before vLLM
            reads them.
        check_request: gets the finished ``EngineCoreRequest`` and the same.

    """
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine.input_processor import InputProcessor

    @wrap(InputProcessor, "process_inputs")
    def process_inputs(upstream: Any, self: "InputProcessor", *args: Any, **kwargs: Any) -> Any:
        if self.model_config.architecture != architecture:
            return upstream(self, *args, **kwargs)
        options = EngineOptions.read(self.vllm_config)
        params = find_argument(upstream, "params", self, *args, **kwargs)
        if isinstance(params, SamplingParams):
            if options is not None and _in_beam_search.get():
                params.extra_args = {f"{REQUEST_PREFIX}mode": Mode.AR.value, **(params.extra_args or {})}
            with _as_validation_error():
                check_params(params, options, self.vllm_config)
        request = upstream(self, *args, **kwargs)
        with _as_validation_error():
            check_request(request, options, self.vllm_config)
        return request


_in_beam_search: contextvars.ContextVar[bool] = contextvars.ContextVar("twotower_in_beam_search", default=False)


@functools.cache
def decode_beams_in_ar(architecture: str, check: Callable[..., None]) -> None:
    """``check(extra_args, options)`` may refuse a beam search; of the others ``check_requests`` has the beams decoded
    in ``ar``.

    Symptom: a beam is a request of one token that carries nothing of the user's request but its temperature, so a
        search over HTTP could not say ``diffusion_mode``. Every search calls ``resolve_watermarking`` with its
        parameters, once and first; the tasks it starts for its beams inherit its context, which says what they are
        (their ids do not, a client may choose any).
    Upstream: vllm.entrypoints.openai.completion.protocol.CompletionRequest.to_beam_search_params,
        vllm.entrypoints.openai.chat_completion.protocol.ChatCompletionRequest.to_beam_search_params,
        vllm.v1.engine.input_processor.InputProcessor.resolve_watermarking
    Removed when: ``BeamSearchParams`` has ``extra_args`` and hands them to its beams.
    Test: tests/test_server.py::test_beam_search_in_ar_and_refused_in_mask_diffusion
    """
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.sampling_params import BeamSearchParams
    from vllm.v1.engine.input_processor import InputProcessor

    for request_type in (CompletionRequest, ChatCompletionRequest):

        @wrap(request_type, "to_beam_search_params")
        def keep_extra_args(upstream: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
            params = upstream(self, *args, **kwargs)
            params.__dict__["twotower_extra_args"] = self.vllm_xargs
            return params

    @wrap(InputProcessor, "resolve_watermarking")
    def check_and_resolve(upstream: Any, self: "InputProcessor", *args: Any, **kwargs: Any) -> bool:
        params = find_argument(upstream, "params", self, *args, **kwargs)
        if self.model_config.architecture == architecture and isinstance(params, BeamSearchParams):
            with _as_validation_error():
                check(params.__dict__.get("twotower_extra_args"), EngineOptions.read(self.vllm_config))
            _in_beam_search.set(True)
        return upstream(self, *args, **kwargs)


@functools.cache
def end_requests_at_shutdown(architecture: str) -> None:
    """Requests that run while the server is told to stop end with an error.

    Symptom: without ``--shutdown-timeout`` SIGTERM kills the engine at once; amid a step it tells nobody, clients wait
        for ever, and the server waits for its clients.
    Upstream: vllm.v1.engine.async_llm.AsyncLLM.shutdown, vllm.v1.engine.async_llm.AsyncLLM.output_handler,
        vllm.v1.engine.output_processor.OutputProcessor.propagate_error, vllm.v1.engine.exceptions.EngineDeadError
    Removed when: ``AsyncLLM.shutdown`` ends what is waiting.
    Test: tests/test_faults.py::test_sigterm_while_generating_ends_what_runs_and_what_waits
    """
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.exceptions import EngineDeadError

    @wrap(AsyncLLM, "shutdown")
    def shutdown_and_tell(upstream: Any, self: "AsyncLLM", *args: Any, **kwargs: Any) -> None:
        upstream(self, *args, **kwargs)
        handler = getattr(self, "output_handler", None)
        if handler is not None and self.model_config.architecture == architecture:
            with contextlib.suppress(RuntimeError):  # the loop has ended: nobody waits
                handler.get_loop().call_soon_threadsafe(self.output_processor.propagate_error, EngineDeadError())
