"""Check, without installing or importing it, that a vLLM wheel has every private vLLM name this package relies on.

    python tools/check_vllm_names.py vllm-0.33.0-*.whl      # a wheel, or the folder of an unpacked one
    python tools/check_vllm_names.py --download 0.33.0      # fetches that wheel first: several hundred MB
    python tools/check_vllm_names.py --installed            # the vLLM of this environment

Most of what we use of vLLM is private and moves without notice, and its GPU wheel cannot be installed where the tests
run. Names and parameters are checked, not what they mean: that is for the tests. Prints one line per missing name;
exits 1 if there is any.
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
Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef

# What is not found by reading our code for imports, calls, overrides and types. By our file: a verb, then objects, each
# followed by names. An object is module:name, the module without "vllm.", or :name where our file imports it. Verbs:
#   has    the class has these members, its bases' and attributes set on self included
#   takes  the callable's positional parameters begin with exactly these
#   reads  its code mentions these names of ours: hooks and settings that do nothing unless vLLM asks for them
RELIED_ON = {
    "registration.py": """
        reads config:ModelConfig verify_and_update_model_config config:VllmConfig verify_and_update_config
        has config:VllmConfig model_config scheduler_config parallel_config attention_config diffusion_config
            additional_config
            config.diffusion:DiffusionConfig canvas_length max_denoising_steps config:AttentionConfig use_non_causal
            config:ModelConfig logits_processors config:ParallelConfig worker_extension_cls
            config:SchedulerConfig async_scheduling max_num_seqs DEFAULT_MAX_NUM_SEQS scheduler_cls
            model_executor.models.registry:_ModelRegistry get_supported_archs register_model""",
    "startup_rules.py": """
        has config:VllmConfig model_config scheduler_config parallel_config cache_config kv_transfer_config
            ec_transfer_config speculative_config lora_config watermark_config use_v2_model_runner
            config:CacheConfig mamba_cache_mode use_replayssm config:ModelConfig max_model_len
            config:ParallelConfig pipeline_parallel_size tensor_parallel_size data_parallel_size ubatch_size enable_dbo
            decode_context_parallel_size prefill_context_parallel_size enable_expert_parallel worker_extension_cls
            enable_batch_sharded_sampling enable_eplb
            config:SchedulerConfig policy max_num_batched_tokens max_num_scheduled_tokens long_prefill_token_threshold
            scheduler_cls prefill_schedule_interval
            platforms.interface:Platform is_cpu""",
    "cli_flag.py": """
        has engine.arg_utils:EngineArgs additional_config model""",
    "cpu/shims.py": """
        reads model_executor.models.nemotron_h:NemotronHModel ALL_DECODER_LAYER_TYPES
        has model_executor.models.nemotron_h:NemotronHMambaDecoderLayer mixer
            model_executor.layers.mamba.mamba_mixer2:MambaMixer2 get_kv_cache_spec ssm_state_size
            v1.kv_cache_interface:MambaSpec num_prefill_checkpoint_blocks prefill_checkpoint_alignment""",
    "compat.py": """
        has v1.outputs:ModelRunnerOutput prompt_logprobs_dict prompt_token_id_logprobs_dict
            v1.core.sched.scheduler:Scheduler grammar_compile_error_reqs
            config:VllmConfig model_config config:ModelConfig architecture""",
    "compat_requests.py": """
        has config:VllmConfig additional_config config:ModelConfig architecture
            v1.engine.async_llm:AsyncLLM output_handler output_processor model_config
            v1.engine.output_processor:OutputProcessor propagate_error""",
    "models/twotower.py": """
        reads v1.worker.gpu.model_states:resolve_model_state_cls get_model_state_cls
            model_executor.model_loader.default_loader:DefaultModelLoader allow_patterns_overrides load_weights
        has :NemotronHForCausalLM hf_to_vllm_mapper forward_context:ForwardContext attn_metadata
            model_executor.models.nemotron_h:NemotronHModel layers
        takes :AutoWeightsLoader.load_weights weights mapper""",
    "cpu/portable_moe.py": """
        reads :NemotronHMoEDecoderLayer.forward mixer norm model_executor.models.utils:AutoWeightsLoader load_weights
            model_executor.models.nemotron_h:NemotronHForCausalLM n_routed_experts n_shared_experts n_logical_experts
            n_physical_experts n_local_physical_experts n_redundant_experts""",
    "models/denoiser_tower.py": """
        has model_executor.models.nemotron_h:NemotronHAttention q_size kv_size attn config:ModelConfig hf_config
            model_executor.layers.mamba.mamba_mixer2:MambaMixer2 kv_cache prefix conv_kernel_size head_dim
            ssm_state_size
        takes :NemotronHMLP config hidden_size intermediate_size quant_config bias
            :NemotronHMoE config quant_config parallel_config prefix :Mixer2RMSNormGated full_hidden_size full_n_groups
            :QKVParallelLinear hidden_size head_size total_num_heads total_num_kv_heads
            :MergedColumnParallelLinear input_size output_sizes :RowParallelLinear input_size output_size
            :LogitsProcessor.forward lm_head hidden_states
            :mamba_v2_sharded_weight_loader shard_spec tp_size tp_rank""",
    "runtime/admission.py": """
        reads v1.worker.gpu.sample.logits_processor.loader:build_custom_logits_processors_params_validator
            validate_params
        has :SamplingParams logprob_token_ids thinking_token_budget""",
    "runtime/model_state.py": """
        reads v1.worker.gpu.model_runner:GPUModelRunner add_request remove_request preprocess_state prepare_attn
            prepare_inputs postprocess_state custom_sampler get_additional_cg_support
        has v1.worker.utils:AttentionGroup kv_cache_spec sampling_params:SamplingParams extra_args seed temperature
            v1.kv_cache_interface:KVCacheGroupSpec kv_cache_spec layer_names
            config:CacheConfig mamba_block_size config:ModelConfig seed""",
    "runtime/sampler.py": """
        has v1.worker.gpu.sample.sampler:Sampler req_states v1.worker.gpu.states:RequestState prefill_len prompt_len
            v1.worker.gpu.buffer_utils:UvaBackedTensor np copy_to_uva
        takes v1.worker.gpu.sample.sampler:Sampler.__call__ logits input_batch
            :SamplerOutput sampled_token_ids logprobs_tensors num_nans num_sampled num_rejected""",
    "runtime/scheduler.py": """
        reads :Scheduler.schedule max_num_active_reqs num_sampled_tokens_per_step _update_after_schedule spec_token_ids
            :Scheduler.update_from_output _free_request
        has :Scheduler running waiting kv_holding_waiting requests finished_req_ids reset_preempted_req_ids
            max_num_active_reqs max_num_scheduled_tokens num_sampled_tokens_per_step
            :Request spec_token_ids num_output_tokens
            :SchedulerOutput total_num_scheduled_tokens finished_req_ids preempted_req_ids scheduled_spec_decode_tokens
            v1.outputs:ModelRunnerOutput req_ids req_id_to_index sampled_token_ids""",
    "runtime/worker_extension.py": """
        has v1.worker.gpu_worker:Worker model_runner v1.worker.gpu.model_runner:GPUModelRunner model_state""",
}


def statements(node: ast.AST | None) -> Iterator[ast.AST]:
    """The statements of a module or class, also those inside ``if`` and ``try``: all bind names of its scope."""
    for part in ("body", "handlers", "orelse", "finalbody"):
        for child in getattr(node, part, []):
            yield child
            if not isinstance(child, Definition):
                yield from statements(child)


def positional(function: ast.FunctionDef) -> list[str]:
    return [a.arg for a in function.args.args if a.arg not in ("self", "cls")]


def accepts(ours: ast.FunctionDef, theirs: ast.FunctionDef) -> bool:
    """Whether calls that fit vLLM's signature fit ours; what our ``**kwargs`` swallows has to come by keyword."""
    mine, wanted, a, b = positional(ours), positional(theirs), ours.args, theirs.args
    shared = [name for name in wanted if name in mine]
    required = set(mine[: len(mine) - len(a.defaults)])
    keyword_only = {k.arg for k in b.kwonlyargs} - {k.arg for k in a.kwonlyargs} - set(mine)
    in_order = mine[: len(shared)] == shared and (shared == wanted or a.vararg or a.kwarg) and required <= set(wanted)
    return bool(in_order and (a.vararg or not b.vararg) and (a.kwarg or not (b.kwarg or keyword_only)))


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
        """What a module defines: name -> its statement, or (module, name) of an import, (module, "") of a module's."""
        if module not in self.tables:
            found = self.tables[module] = {}
            for name, value in (b for node in statements(self.module(module)) for b in self.bindings(module, node)):
                found.setdefault(name, value)  # the first: what TYPE_CHECKING sees comes before any fallback
        return self.tables[module]

    def bindings(self, module: str, node: ast.AST) -> Iterator[tuple]:
        if isinstance(node, Definition):
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
            stored = (n for n in ast.walk(cls) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store))
            found += [n.attr for n in stored if ast.unparse(n.value) == "self"]
        return found

    def takes(self, module: str, node: ast.AST | None) -> list[str]:
        """The parameters of a function or class, positional ones first; "**" if it takes any keyword."""
        if isinstance(node, ast.ClassDef):
            node = self.resolve(module, f"{node.name}.__init__")[1] or node
        if not isinstance(node, ast.FunctionDef):
            return self.members(module, node) if isinstance(node, ast.ClassDef) else ["**"]
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
            rows = RELIED_ON.get(self.label.removeprefix(f"{PACKAGE}/"), "")
            self.check_table(path.read_text(encoding="utf-8"), rows.split())

    def expect(self, ok: object, line: int, name: str, problem: str = "is missing") -> None:
        self.count += 1
        if not ok:
            self.missing.setdefault(f"{name} {problem}", f"{self.label}:{line}: {name} {problem}")

    def check_module(self, module: str) -> None:
        nodes = list(ast.walk(self.sources.module(module) or ast.Module([], [])))
        self.imported: dict[str, tuple[str, str]] = {}
        for node in (n for n in nodes if isinstance(n, ast.Import | ast.ImportFrom)):
            for name, value in self.sources.bindings(module, node):
                if value[0].split(".")[0] == "vllm":
                    self.imported[name] = value
                    found = value[1] in self.sources.names(value[0]) or self.sources.resolve(*value)[1]
                    self.expect(found, node.lineno, ".".join(filter(None, value)))
        for node in nodes:
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in self.imported:
                self.check_call(node, *self.imported[node.func.id])
            elif isinstance(node, ast.ClassDef):
                self.check_class(module, node)
            elif isinstance(node, ast.FunctionDef):
                self.check_function(node)

    def check_call(self, call: ast.Call, module: str, name: str) -> None:
        takes = self.sources.takes(*self.sources.resolve(module, name))
        for keyword in (k.arg for k in call.keywords if k.arg):
            self.expect(keyword in takes or "**" in takes, call.lineno, f"{module}.{name}({keyword}=)")

    def check_function(self, function: ast.FunctionDef) -> None:
        """``x.name`` where x is an imported class or module, or a parameter annotated with such a class."""
        types = {a.arg: ast.unparse(a.annotation).strip("'") for a in function.args.args if a.annotation}
        for node in (n for n in ast.walk(function) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load)):
            x = ast.unparse(node.value)
            value = self.imported.get(types.get(x, x), ("", ""))
            where, owner = self.sources.resolve(*value)
            if isinstance(owner, ast.ClassDef | ast.Module):
                known = self.sources.members(where, owner)
                self.expect(node.attr in known, node.lineno, ".".join([*filter(None, value), node.attr]))

    def check_class(self, module: str, cls: ast.ClassDef) -> None:
        """The methods of vLLM's that our class overrides, and what its ``self`` and ``super()`` have from vLLM."""
        for base in (self.imported[b] for b in map(ast.unparse, cls.bases) if b in self.imported):
            where, parent = self.sources.resolve(*base)
            path = ".".join(base)
            if not isinstance(parent, ast.ClassDef):
                self.expect(parent is None, cls.lineno, path, "is no longer a class")
                continue
            known = {"super()": self.sources.members(where, parent), "self": self.sources.members(module, cls)}
            for node in (n for n in ast.walk(cls) if isinstance(n, ast.Attribute) and n.attr != "__init__"):
                found = node.attr in known.get(ast.unparse(node.value), [node.attr])
                self.expect(found, node.lineno, f"{path}.{node.attr}")
            for ours in (m for m in cls.body if isinstance(m, ast.FunctionDef)):
                theirs = self.sources.resolve(where, f"{parent.name}.{ours.name}")[1]
                if isinstance(theirs, ast.FunctionDef):
                    problem = f"takes ({ast.unparse(theirs.args)}), ours ({ast.unparse(ours.args)})"
                    self.expect(accepts(ours, theirs), ours.lineno, f"{path}.{ours.name}", problem)

    def check_table(self, text: str, words: list[str]) -> None:
        line_of = {word: n for n, line in [*enumerate(text.splitlines(), 1)][::-1] for word in re.findall(r"\w+", line)}
        verb, title, known = "", "", []
        for word in words:
            line = line_of.get(title.split(".")[-1] if verb == "takes" else word)
            if word in ("has", "takes", "reads"):
                verb = word
            elif ":" in word:
                module, name = word.split(":")
                source = f"vllm.{module}" if module else self.imported.get(name.split(".")[0], ("vllm", ""))[0]
                where, node = self.sources.resolve(source, name)
                title, known = f"{source}.{name}", self.known(verb, where, node) if node else None
                self.expect(node, line_of.get(name.split(".")[-1], 1), title)
            elif known is not None:
                self.expect(line, 1, f"{title} {word}", "is not used here any more: take it out of RELIED_ON")
                ok = known[:1] == [word] if verb == "takes" else word in known
                known = known[1:] if verb == "takes" else known
                name, problem = (
                    (f"{title}.{word}", "is missing") if verb == "has" else (title, f"no longer {verb} {word}")
                )
                self.expect(ok, line or 1, name, problem)

    def known(self, verb: str, module: str, node: ast.AST) -> list[str]:
        if verb == "reads":
            return re.findall(r"\w+", ast.unparse(node))
        return self.sources.members(module, node) if verb == "has" else self.sources.takes(module, node)


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
