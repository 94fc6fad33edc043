"""The steps that are rehearsed: requests of every mode through the engine core's own steps, each step recorded."""

import time
from dataclasses import dataclass, field
from typing import Any

import torch

from tests.rehearsal.device import Device, Record
from tests.rehearsal.engine import find_model, find_runner

PROMPT_TOKENS = 40

LAYER_KINDS = {"M": "mamba", "E": "experts", "*": "attention", "-": "mlp"}


@dataclass
class RehearsedStep:
    """What one engine step did."""

    name: str
    kind: str
    """The tower that ran: ``context`` or ``denoise``."""
    record: Record
    dtypes: dict[str, str] = field(default_factory=dict)


class Watch:
    """Scopes and dtypes of the model's parts, while steps run."""

    def __init__(self, core: Any, device: Device) -> None:
        self.device, self.dtypes = device, dict[str, str]()
        model = find_model(core.model_executor)
        pattern = model.config.hybrid_override_pattern
        towers = [("context", model.model.layers)] if model.holds_context else []
        towers += [("denoiser", model.denoiser.layers)] if model.denoiser is not None else []
        self.num_layers = {
            f"{tower} {LAYER_KINDS[kind]}": pattern.count(kind) for tower, _ in towers for kind in pattern
        }
        for tower, layers in towers:
            for kind, layer in zip(pattern, layers, strict=True):
                self._scope(layer, f"{tower} {LAYER_KINDS[kind]}")
            for name, module in layers.named_modules():
                if name.endswith(".gate"):
                    self._note_dtype(module, f"{tower} router logits")
        for tower, owner in (("context", model), ("denoiser", model.denoiser)):
            if owner is not None and hasattr(owner, "logits_processor"):
                self._note_dtype(owner.logits_processor, f"{tower} logits")

    def _scope(self, module: torch.nn.Module, scope: str) -> None:
        def enter(*_: Any) -> None:
            if self.device.record is not None:
                self.device.record.scope = scope

        def leave(*_: Any) -> None:
            if self.device.record is not None:
                self.device.record.scope = ""

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave)

    def _note_dtype(self, module: torch.nn.Module, name: str) -> None:
        def note(_module: Any, _inputs: Any, output: Any) -> None:
            tensor = output[0] if isinstance(output, tuple) else output
            if tensor is not None:
                self.dtypes[name] = str(tensor.dtype).removeprefix("torch.")

        module.register_forward_hook(note)


def add_requests(core: Any, num_rows: int, mode: str, **settings: Any) -> None:
    """Give the engine core some requests of a mode."""
    from vllm.v1.engine import EngineCoreRequest

    from vllm_twotower import diffusion_params

    for row in range(num_rows):
        request = EngineCoreRequest(
            request_id=f"{mode}-{row}",
            prompt_token_ids=[1 + row] + [5] * (PROMPT_TOKENS - 1),
            mm_features=None,
            sampling_params=diffusion_params(mode=mode, max_tokens=64, ignore_eos=True, **settings),
            pooling_params=None,
            arrival_time=time.time(),
            lora_request=None,
            cache_salt=None,
            data_parallel_rank=None,
        )
        core.add_request(*core.preprocess_add_request(request))


def take_steps(core: Any, watch: Watch, names: list[str]) -> list[RehearsedStep]:
    """Let the engine core take a step for each name."""
    steps = []
    for name in names:
        watch.dtypes = {}
        with watch.device.recording() as record:
            core.step_fn()
        step = find_runner(core.model_executor).model_state.last_step
        steps.append(RehearsedStep(name, step.kind.value, record, dict(watch.dtypes)))
    return steps


def end_requests(core: Any) -> None:
    """Take the requests out of the engine core."""
    core.abort_requests(list(core.scheduler.requests))
    core.step_fn()


STEPS = {
    "mask_diffusion": ["prompt", "denoise pass", "commit"],
    "mock_ar": ["mock-AR prompt", "mock-AR pass", "mock-AR commit"],
    "ar": ["AR prompt", "AR step"],
    "self_speculation": ["drafting prompt", "draft", "verification and replay"],
}
"""By mode, what its steps are called."""

WITHOUT_CONTEXT = ("mask_diffusion", "mock_ar")
"""Modes of a rank without the context tower: tokens of AR rows would come from another rank, and none comes here."""


def rehearse(core: Any, device: Device, num_rows: int) -> tuple[list[RehearsedStep], Watch]:
    """Every kind of step, on an engine that has started."""
    watch = Watch(core, device)
    steps: list[RehearsedStep] = []
    holds_context = find_model(core.model_executor).holds_context
    for mode, names in STEPS.items():
        if not holds_context and mode not in WITHOUT_CONTEXT:
            continue
        add_requests(core, num_rows, mode, temperature=0.0)
        steps += take_steps(core, watch, names)
        end_requests(core)
    return steps, watch
