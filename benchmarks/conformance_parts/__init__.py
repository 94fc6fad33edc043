"""Parts of ``benchmarks.conformance``: vLLM's tests, the redirection of their servers, the page."""
