"""Check on a vLLM wheel, without installing or importing it, that every private vLLM name this package relies on is still there.

    python tools/check_vllm_names.py vllm-0.33.0-*.whl      # a wheel, or the folder of an unpacked one
    python tools/check_vllm_names.py --download 0.33.0      # fetches that wheel first: several hundred MB
    python tools/check_vllm_names.py --installed            # the vLLM of this environment

Most of what we use of vLLM is private and moves without notice, and its GPU wheel cannot be installed where the tests run. Names
and parameters are checked, not what they mean: that is for the tests. Prints one line per missing name; exits 1 if there is any.
"""

import argparse
import ast
import importlib.util
import pathlib
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = "vllm_twotower"
# What vLLM's wheels have been tagged with: 0.32 and 0.33 are 2_28, 0.20 was 2_35, 0.12 to 0.19 were 2_31.
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_31_x86_64", "manylinux_2_35_x86_64")

# What reading our code for imports, calls, overrides and types does not find, by our file: a verb, then objects ("module:name", the
# module without "vllm.", or ":name" as imported in our file), each followed by names:
#   has    the class has these members, its bases' and attributes set on self included
#   takes  the callable's positional parameters begin with exactly these
#   reads  its code mentions these names of ours: hooks and settings that do nothing unless vLLM asks for them
RELIED_ON = {
    "registration.py": """
        reads config:ModelConfig verify_and_update_model_config config:VllmConfig verify_and_update_config
        has config:VllmConfig model_config scheduler_config parallel_config cache_config attention_config diffusion_config
            additional_config kv_transfer_config ec_transfer_config speculative_config lora_config watermark_config
            use_v2_model_runner
            config.diffusion:DiffusionConfig canvas_length max_denoising_steps
            config:AttentionConfig use_non_causal config:CacheConfig mamba_cache_mode use_replayssm
            config:ModelConfig logits_processors max_model_len
            config:ParallelConfig pipeline_parallel_size tensor_parallel_size data_parallel_size enable_expert_parallel
            decode_context_parallel_size prefill_context_parallel_size enable_dbo ubatch_size worker_extension_cls
            enable_batch_sharded_sampling
            config:SchedulerConfig async_scheduling max_num_seqs DEFAULT_MAX_NUM_SEQS policy max_num_batched_tokens
            max_num_scheduled_tokens long_prefill_token_threshold scheduler_cls
            model_executor.models.registry:_ModelRegistry get_supported_archs register_model
            platforms.interface:Platform is_cpu""",
    "compat.py": """
        reads model_executor.models.nemotron_h:NemotronHModel ALL_DECODER_LAYER_TYPES
        has model_executor.models.nemotron_h:NemotronHMambaDecoderLayer mixer
            model_executor.layers.mamba.mamba_mixer2:MambaMixer2 get_kv_cache_spec ssm_state_size
            v1.kv_cache_interface:MambaSpec num_prefill_checkpoint_blocks prefill_checkpoint_alignment
            v1.outputs:ModelRunnerOutput prompt_logprobs_dict prompt_token_id_logprobs_dict""",
    "models/twotower.py": """
        reads v1.worker.gpu.model_states:resolve_model_state_cls get_model_state_cls
            model_executor.model_loader.default_loader:DefaultModelLoader allow_patterns_overrides load_weights
        has model_executor.models.nemotron_h:NemotronHModel layers forward_context:ForwardContext attn_metadata
        takes :AutoWeightsLoader.load_weights weights mapper""",
    "models/portable_moe.py": """
        reads model_executor.models.nemotron_h:NemotronHForCausalLM n_routed_experts n_logical_experts n_physical_experts
            n_local_physical_experts n_redundant_experts n_shared_experts
            :NemotronHMoEDecoderLayer.forward mixer norm model_executor.models.utils:AutoWeightsLoader load_weights""",
    "models/denoiser_tower.py": """
        has model_executor.models.nemotron_h:NemotronHAttention q_size kv_size attn config:ModelConfig hf_config
            model_executor.layers.mamba.mamba_mixer2:MambaMixer2 kv_cache prefix conv_kernel_size head_dim ssm_state_size
        takes :NemotronHMLP config hidden_size intermediate_size quant_config bias
            :NemotronHMoE config quant_config parallel_config prefix :Mixer2RMSNormGated full_hidden_size full_n_groups
            :QKVParallelLinear hidden_size head_size total_num_heads total_num_kv_heads
            :MergedColumnParallelLinear input_size output_sizes :RowParallelLinear input_size output_size
            :LogitsProcessor.forward lm_head hidden_states :mamba_v2_sharded_weight_loader shard_spec tp_size tp_rank""",
    "runtime/admission.py": """
        reads v1.worker.gpu.sample.logits_processor.loader:build_custom_logits_processors_params_validator validate_params
        has :SamplingParams logprob_token_ids thinking_token_budget""",
    "runtime/model_state.py": """
        reads v1.worker.gpu.model_runner:GPUModelRunner add_request remove_request preprocess_state prepare_attn
            prepare_inputs postprocess_state custom_sampler get_additional_cg_support
        has v1.worker.utils:AttentionGroup kv_cache_spec v1.kv_cache_interface:KVCacheGroupSpec kv_cache_spec layer_names
            sampling_params:SamplingParams extra_args seed temperature
            config:CacheConfig mamba_block_size config:ModelConfig seed""",
    "runtime/sampler.py": """
        has v1.worker.gpu.sample.sampler:Sampler req_states v1.worker.gpu.states:RequestState prefill_len prompt_len
            v1.worker.gpu.buffer_utils:UvaBackedTensor np copy_to_uva
        takes v1.worker.gpu.sample.sampler:Sampler.__call__ logits input_batch
            :SamplerOutput sampled_token_ids logprobs_tensors num_nans num_sampled num_rejected""",
    "runtime/scheduler.py": """
        reads :Scheduler.schedule spec_token_ids max_num_active_reqs num_sampled_tokens_per_step _update_after_schedule
            :Scheduler.update_from_output _free_request
        has :Request spec_token_ids num_output_tokens v1.outputs:ModelRunnerOutput req_ids req_id_to_index sampled_token_ids
            :SchedulerOutput total_num_scheduled_tokens finished_req_ids preempted_req_ids scheduled_spec_decode_tokens""",
    "runtime/worker_extension.py": """
        has v1.worker.gpu_worker:Worker model_runner v1.worker.gpu.model_runner:GPUModelRunner model_state""",
}


def statements(node: ast.AST | None) -> Iterator[ast.AST]:
    """The statements of a module or class, with those inside ``if``, ``try`` and ``with``: all bind names of the same scope."""
    for part in ("body", "handlers", "orelse", "finalbody"):
        for child in getattr(node, part, []):
            yield child
            if not isinstance(child, ast.FunctionDef | ast.ClassDef):
                yield from statements(child)


def positional(function: ast.FunctionDef) -> list[str]:
    return [a.arg for a in function.args.args if a.arg not in ("self", "cls")]


def accepts(ours: ast.FunctionDef, theirs: ast.FunctionDef) -> bool:
    """Whether calls that fit vLLM's signature fit ours; what our ``**kwargs`` swallows has to come by keyword."""
    mine, wanted = positional(ours), positional(theirs)
    shared = [name for name in wanted if name in mine]
    complete = shared == wanted or ours.args.vararg or ours.args.kwarg
    lacking = {a.arg for a in theirs.args.kwonlyargs} - {a.arg for a in ours.args.kwonlyargs} - set(mine)
    return bool(mine[: len(shared)] == shared and complete and (ours.args.kwarg or not (lacking or theirs.args.kwarg)))


class Sources:
    """The modules of one vLLM, and ours beside them; looks names up as an import would."""

    def __init__(self, root: pathlib.Path | zipfile.Path) -> None:
        self.roots = {"vllm": root, PACKAGE: ROOT}
        self.modules: dict[str, ast.Module | None] = {}
        self.packages: set[str] = set()
        self.tables: dict[str, dict] = {}

    def module(self, name: str) -> ast.Module | None:
        root, stem = self.roots.get(name.split(".")[0]), name.replace(".", "/")
        if root is not None and name not in self.modules:
            package, plain = root / f"{stem}/__init__.py", root / f"{stem}.py"
            path = package if package.is_file() else plain
            self.modules[name] = ast.parse(path.read_text(encoding="utf-8")) if path.is_file() else None
            self.packages |= {name} if path is package else set()
        return self.modules.get(name)

    def names(self, module: str) -> dict:
        """What a module defines: name -> its statement, or (module, name) of what it imports ("" for a whole module)."""
        if module not in self.tables:
            found = self.tables[module] = {}
            for name, value in (b for node in statements(self.module(module)) for b in self.bindings(module, node)):
                found.setdefault(name, value)  # the first: what TYPE_CHECKING sees comes before any fallback
        return self.tables[module]

    def bindings(self, module: str, node: ast.AST) -> Iterator[tuple]:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            yield node.name, node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from ((n.id, node) for t in targets for n in ast.walk(t) if isinstance(n, ast.Name))
        elif isinstance(node, ast.Import):
            yield from ((a.asname or a.name, (a.name, "")) for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            path = module.split(".") + ["__init__"] * (module in self.packages)
            source = ".".join([*(path[: -node.level] if node.level else []), *([node.module] if node.module else [])])
            for a in node.names:
                names = list(self.names(source)) if a.name == "*" else [a.name]
                yield from ((a.asname or name, (source, name)) for name in names)

    def resolve(self, module: str, name: str) -> tuple[str, ast.AST | None]:
        """Follow re-exports and dots (``Class.method``) to the definition and the module that holds it."""
        first, _, rest = name.partition(".")
        value = self.names(module).get(first)
        if isinstance(value, tuple):
            return self.resolve(value[0], ".".join(p for p in (value[1], rest) if p))
        if isinstance(value, ast.ClassDef) and rest:
            methods = ((m, n) for m, c in self.lineage(module, value) for n in c.body if getattr(n, "name", "") == rest)
            return next(methods, (module, None))
        path = f"{module}.{name}".rstrip(".")
        return (module, value) if value or not self.module(path) else (path, self.module(path))

    def lineage(self, module: str, cls: ast.ClassDef) -> Iterator[tuple[str, ast.ClassDef]]:
        """A class and its bases, as far as they are vLLM's or ours."""
        yield module, cls
        for base in cls.bases:
            where, node = self.resolve(module, ast.unparse(base).partition("[")[0])
            if isinstance(node, ast.ClassDef):
                yield from self.lineage(where, node)

    def members(self, module: str, owner: ast.AST) -> list[str]:
        """What a class, its bases and their ``self`` have, or a module; fields of a dataclass in their order."""
        found = list(self.names(module)) if isinstance(owner, ast.Module) else []
        for where, cls in self.lineage(module, owner) if isinstance(owner, ast.ClassDef) else ():
            found += [name for node in statements(cls) for name, _ in self.bindings(where, node)]
            found += re.findall(r"\bself\.(\w+)(?:: .*)? = ", ast.unparse(cls))
        return found

    def takes(self, module: str, name: str) -> list[str]:
        """The parameters of a function or class, positional ones first; "**" if it takes any keyword."""
        where, node = self.resolve(module, name)
        if isinstance(node, ast.ClassDef):
            node = self.resolve(where, f"{node.name}.__init__")[1] or node
        if not isinstance(node, ast.FunctionDef):
            return self.members(where, node) if isinstance(node, ast.ClassDef) else ["**"]
        return positional(node) + [a.arg for a in node.args.kwonlyargs] + ["**"] * (node.args.kwarg is not None)


class Checker:
    """Walks our modules and keeps what the vLLM at hand lacks, each name once."""

    def __init__(self, root: pathlib.Path | zipfile.Path) -> None:
        self.sources = Sources(root)
        self.count = 0
        self.missing: dict[str, str] = {}
        for path in sorted((ROOT / PACKAGE).rglob("*.py")):
            self.label = path.relative_to(ROOT).as_posix()
            self.check_module(self.label.removesuffix(".py").removesuffix("/__init__").replace("/", "."))
            self.check_table(path.read_text(encoding="utf-8"), RELIED_ON.get(path.relative_to(ROOT / PACKAGE).as_posix(), ""))

    def expect(self, ok: object, line: int, name: str, problem: str = "is missing") -> None:
        self.count += 1
        if not ok:
            self.missing.setdefault(name, f"{self.label}:{line}: {name} {problem}")

    def check_module(self, module: str) -> None:
        nodes = list(ast.walk(self.sources.module(module) or ast.Module([], [])))
        self.imported: dict[str, tuple[str, str]] = {}
        for node in nodes:
            for name, value in self.sources.bindings(module, node) if isinstance(node, ast.Import | ast.ImportFrom) else ():
                if value[0].split(".")[0] == "vllm":
                    self.imported[name] = value
                    found = value[1] in self.sources.names(value[0]) or self.sources.resolve(*value)[1]
                    self.expect(found, node.lineno, ".".join(value).rstrip("."))
        for node in nodes:
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in self.imported:
                self.check_call(node, *self.imported[node.func.id])
            elif isinstance(node, ast.ClassDef):
                self.check_overrides(module, node)
            elif isinstance(node, ast.FunctionDef):
                self.check_members(node)

    def check_call(self, call: ast.Call, module: str, name: str) -> None:
        takes = self.sources.takes(module, name)
        for keyword in (k.arg for k in call.keywords if k.arg):
            self.expect(keyword in takes or "**" in takes, call.lineno, f"{module}.{name}({keyword}=)")

    def check_members(self, function: ast.FunctionDef) -> None:
        """``x.name`` where x is an imported class or module, or a parameter annotated with such a class."""
        types = {a.arg: ast.unparse(a.annotation).strip("'") for a in function.args.args if a.annotation}
        for node in ast.walk(function):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                value = self.imported.get(types.get(node.value.id, node.value.id), ("", ""))
                where, owner = self.sources.resolve(*value)
                if isinstance(owner, ast.ClassDef | ast.Module):
                    name = ".".join([*filter(None, value), node.attr])
                    self.expect(node.attr in self.sources.members(where, owner), node.lineno, name)

    def check_overrides(self, module: str, cls: ast.ClassDef) -> None:
        """Methods of vLLM's that a class of ours overrides, and every ``self.name`` it may have from vLLM."""
        bases = [self.imported[b] for b in map(ast.unparse, cls.bases) if b in self.imported]
        inherited = self.sources.members(module, cls) if bases else []
        for node in ast.walk(cls) if bases else ():
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("self", "super()"):
                self.expect(node.attr in inherited, node.lineno, f"{'.'.join(bases[0])}.{node.attr}")
        for base in bases:
            is_class = isinstance(self.sources.resolve(*base)[1], ast.ClassDef)
            self.expect(is_class, cls.lineno, ".".join(base), "is no longer a class")
            for ours in (m for m in cls.body if isinstance(m, ast.FunctionDef)):
                theirs = self.sources.resolve(base[0], f"{base[1]}.{ours.name}")[1]
                if isinstance(theirs, ast.FunctionDef):
                    problem = f"takes ({ast.unparse(theirs.args)}), ours ({ast.unparse(ours.args)})"
                    self.expect(accepts(ours, theirs), ours.lineno, f"{'.'.join(base)}.{ours.name}", problem)

    def check_table(self, text: str, rows: str) -> None:
        verb, target = "", ("", "")
        for word in rows.split():
            if word in ("has", "takes", "reads"):
                verb = word
            elif ":" in word:
                module, first = word.split(":")
                target = (f"vllm.{module}", first) if module else (self.imported.get(first.split(".")[0], ("vllm", ""))[0], first)
                taken = self.sources.takes(*target) if verb == "takes" else []
            else:
                self.check_name(text, verb, target, word, taken)


def root_of_installed() -> pathlib.Path:
    spec = importlib.util.find_spec("vllm")  # finds it without importing it
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("no vLLM is installed here: give a wheel, or --download VERSION")
    return pathlib.Path(spec.submodule_search_locations[0]).parent


def download(version: str, folder: str) -> pathlib.Path:
    print(f"downloading vllm {version}, several hundred MB", file=sys.stderr)
    platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", *platforms]
    subprocess.run([*command, "--dest", folder, f"vllm=={version}"], check=True)
    return next(pathlib.Path(folder).glob("vllm-*.whl"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("wheel", nargs="?", type=pathlib.Path)
    which.add_argument("--download", metavar="VERSION")
    which.add_argument("--installed", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = root_of_installed() if args.installed else args.wheel or download(args.download, folder)
        checker = Checker(path if path.is_dir() else zipfile.Path(path))
    if checker.missing:
        print("\n".join(checker.missing.values()))
        sys.exit(1)
    print(f"{checker.count} uses of vLLM's names checked, all there")


if __name__ == "__main__":
    main()
