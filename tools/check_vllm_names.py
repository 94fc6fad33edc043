"""Check that a vLLM has what this package uses of it, without importing or installing that vLLM.

    python -m tools.check_vllm_names --installed            # the vLLM of this environment
    python -m tools.check_vllm_names vllm-0.33.0-*.whl      # a wheel, or the folder of an unpacked one

A wheel of several hundred MB comes with, for example,
``pip download --no-deps --only-binary=:all: --platform manylinux_2_28_x86_64 vllm==0.33.0``.

Most of what we use of vLLM is private and moves without notice, and its GPU wheel cannot be installed where the tests
run. mypy reads that vLLM (a minute; seconds with its cache) and sees names that are gone, keywords that calls no longer
take and overridden methods with other parameters. What it cannot see is handed to it as one more file, made here: what
shims say that they touch (``Upstream:``), the settings that start-up rules name, ``ATTRIBUTES``. What has to be asked
for by name in vLLM's own code, or does nothing, is looked for there (``ASKED_FOR``). What names mean is for the tests.
Prints one line per problem; exits 1 if there is any.
"""

import argparse
import ast
import importlib.util
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator

from tools.shim_sections import PACKAGE, read_shims

ROOT = pathlib.Path(__file__).resolve().parents[1]
CODES: dict[str, Callable[[str], bool]] = {
    "attr-defined": bool,
    "call-arg": bool,
    "call-overload": bool,
    "import-not-found": lambda text: '"vllm' in text,
    "misc": lambda text: "undefined in superclass" in text,
    "name-defined": bool,
    "override": bool,
}
"""Of mypy's complaints, those about names and parameters: code -> whether a text is one."""
COMPLAINT = re.compile(r"(?P<file>.*?):(?P<line>\d+): error: (?P<text>.*)  \[(?P<code>[\w-]+)\]")
CACHE = ROOT / ".mypy_cache" / "vllm"

ATTRIBUTES = """
    model_executor.models.nemotron_h.NemotronHForCausalLM: hf_to_vllm_mapper
    model_executor.models.nemotron_h.NemotronHModel: layers
    model_executor.models.nemotron_h.NemotronHMambaDecoderLayer: mixer
    model_executor.models.nemotron_h.NemotronHAttention: q_size kv_size attn
    model_executor.layers.mamba.mamba_mixer2.MambaMixer2: kv_cache prefix conv_kernel_size head_dim ssm_state_size
    v1.kv_cache_interface.MambaSpec: num_prefill_checkpoint_blocks prefill_checkpoint_alignment
    v1.kv_cache_interface.KVCacheGroupSpec: kv_cache_spec layer_names
    v1.worker.utils.AttentionGroup: kv_cache_spec
    v1.worker.gpu.sample.sampler.Sampler: req_states sampling_states logits_processors
    v1.worker.gpu.states.RequestState: prefill_len prompt_len
    v1.worker.gpu.buffer_utils.UvaBackedTensor: np copy_to_uva
    v1.worker.gpu_worker.Worker: model_runner
    v1.worker.gpu.model_runner.GPUModelRunner: model_state
    config.CacheConfig: mamba_block_size
"""
"""By class, attributes that our code reads of modules (torch's answer to any name) and of what it knows no type of."""

ASKED_FOR = """
    config.model.ModelConfig: verify_and_update_model_config
    config.vllm.VllmConfig: verify_and_update_config
    model_executor.models.nemotron_h.NemotronHMoEDecoderLayer: NemotronHMoE
    model_executor.models.nemotron_h.NemotronHForCausalLM: n_routed_experts n_shared_experts n_logical_experts
        n_physical_experts n_local_physical_experts n_redundant_experts
    model_executor.models.utils.AutoWeightsLoader: load_weights
    model_executor.model_loader.default_loader.DefaultModelLoader: allow_patterns_overrides load_weights
    v1.worker.gpu.model_states.resolve_model_state_cls: get_model_state_cls
    v1.worker.gpu.model_runner.GPUModelRunner: add_request remove_request preprocess_state prepare_attn prepare_inputs
        postprocess_state custom_sampler get_additional_cg_support
    v1.worker.gpu.warmup.warmup_kernels: _warmup_
    engine.arg_utils.EngineArgs.from_cli_args: args
    engine.arg_utils.EngineArgs._set_default_max_num_seqs_and_batched_tokens_args: model_config
    model_executor.models.registry._ModelRegistry._raise_for_unsupported: architectures
    v1.engine.input_processor.InputProcessor.process_inputs: params
    v1.engine.input_processor.InputProcessor.resolve_watermarking: params
    v1.core.sched.scheduler.Scheduler.schedule: max_num_active_reqs num_sampled_tokens_per_step
        _update_after_schedule spec_token_ids next_decode_eligible_step
    v1.core.sched.scheduler.Scheduler.update_from_output: _free_request grammar_compile_error_reqs
"""
"""By class or function of vLLM, hooks of ours that its code has to ask for, and parameters that we look up by name."""


def read_table(text: str) -> Iterator[tuple[str, list[str]]]:
    """(owner, its names) of each row; a row goes on where no colon begins another."""
    for row in re.split(r"\n(?=.*:)", text.strip()):
        owner, _, names = row.partition(":")
        yield f"vllm.{owner.strip()}", names.split()


def touched_names() -> dict[str, str]:
    """Dotted name of vLLM's -> the file of ours that leans on it."""
    found = {}
    for shim in read_shims():
        found |= dict.fromkeys(shim.touched, f"{PACKAGE.name}/{shim.file}")
    rules = PACKAGE / "frontend" / "startup_rules.py"
    calls = re.findall(r"_(?:find|given|above_one|equals|other_class)\((\".*?)\)", rules.read_text(encoding="utf-8"))
    for setting in re.findall(r"\"(\w+_config[.\w]*)\"", " ".join(calls)):
        found[f"vllm.config.VllmConfig.{setting}"] = rules.relative_to(ROOT).as_posix()
    for owner, names in read_table(ATTRIBUTES):
        found |= {f"{owner}.{name}": "tools/check_vllm_names.py" for name in names}
    return found


def find_module(root: pathlib.Path, dotted: str) -> tuple[pathlib.Path, list[str]]:
    """The file of the longest module that a dotted name begins with, and the names after it."""
    parts = dotted.split(".")
    for n in range(len(parts), 0, -1):
        stem = root.joinpath(*parts[:n])
        for path in (stem / "__init__.py", stem.with_suffix(".py")):
            if path.is_file():
                return path, parts[n:]
    raise SystemExit(f"{root} holds no vLLM")


def read_expression(root: pathlib.Path, dotted: str) -> str:
    """Python that reads a dotted name, for mypy."""
    _, rest = find_module(root, dotted)
    module = dotted.removesuffix("." + ".".join(rest)) if rest else dotted
    if not rest:
        return f"import {module}"
    return f"from {module} import {rest[0]}" + (f"; {'.'.join(rest)}" if rest[1:] else "")


def check_types(root: pathlib.Path) -> list[str]:
    """What mypy finds wrong with our package, and with the touched names, against the vLLM in ``root``."""
    touched = touched_names()
    # what is installed mypy finds itself, and wants not to be told
    environment = os.environ if root.name == "site-packages" else {**os.environ, "MYPYPATH": str(root)}
    command = [sys.executable, "-m", "mypy", "--config-file=", "--check-untyped-defs", "--follow-imports=silent"]
    command += ["--python-version=3.11", "--no-error-summary", "--no-pretty", f"--cache-dir={CACHE}", PACKAGE.name]
    with tempfile.TemporaryDirectory() as folder:
        uses = pathlib.Path(folder) / "uses_of_vllm.py"
        lines = (f"def _{n}() -> None: {read_expression(root, name)}" for n, name in enumerate(touched))
        uses.write_text("\n".join(lines), encoding="utf-8")
        done = subprocess.run(
            [*command, str(uses)], capture_output=True, text=True, check=False, env=environment, cwd=ROOT
        )
    if done.returncode > 1:
        raise SystemExit(done.stdout + done.stderr)
    problems = []
    for line in done.stdout.splitlines():
        complaint = COMPLAINT.fullmatch(line)
        if not complaint or complaint["code"] not in CODES or not CODES[complaint["code"]](complaint["text"]):
            continue
        name = list(touched)[int(complaint["line"]) - 1] if complaint["file"] == str(uses) else None
        problems.append(f"{touched[name]}: {name} is missing" if name else line.replace(" error:", ""))
    return problems


def check_hooks(root: pathlib.Path) -> list[str]:
    """What vLLM's code no longer asks for."""
    problems = []
    for owner, wanted in read_table(ASKED_FOR):
        path, names = find_module(root, owner)
        node: ast.AST | None = ast.parse(path.read_text(encoding="utf-8"))
        for name in names:
            node = next((n for n in ast.walk(node) if getattr(n, "name", "") == name), None) if node else None
        text = ast.unparse(node) if node else ""
        for name in wanted:
            if not re.search(rf"\b{name}", text):
                problems.append(f"tools/check_vllm_names.py: {owner} no longer asks for {name}")
    return problems


def root_of_installed() -> pathlib.Path:
    """The folder that ``vllm`` is installed in."""
    spec = importlib.util.find_spec("vllm")  # finds it without importing it
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("no vLLM is installed here: give a wheel")
    return pathlib.Path(spec.submodule_search_locations[0]).parent


def unpack(wheel: pathlib.Path, folder: str) -> pathlib.Path:
    """Take the Python out of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder, [n for n in archive.namelist() if n.endswith((".py", ".pyi", "py.typed"))])
    return pathlib.Path(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("wheel", nargs="?", type=pathlib.Path)
    which.add_argument("--installed", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = root_of_installed() if args.installed else args.wheel
        root = path if path.is_dir() else unpack(path, folder)
        problems = check_types(root) + check_hooks(root)
    print("\n".join(problems) or "this vLLM has every name that we use")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
