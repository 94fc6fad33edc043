"""Check on a vLLM wheel, without installing or importing it, that every private vLLM name this package relies on is still there.

    python tools/check_vllm_names.py vllm-0.33.0-*.whl      # a wheel, or the folder of an unpacked one
    python tools/check_vllm_names.py --download 0.33.0      # fetches that wheel first: several hundred MB
    python tools/check_vllm_names.py --installed            # the vLLM of this environment

Most of what we use of vLLM is private and moves without notice, and its GPU wheel cannot be installed where the tests run. Imports,
calls, overridden methods and the members of what has a vLLM type are found by reading our code; the rest is in ``RELIED_ON``. Names
and parameters are checked, not what they mean: that is for the tests. Prints one line per missing name; exits 1 if there is any.
"""

import argparse
import ast
import importlib.util
import pathlib
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = "vllm_twotower"
# What vLLM's wheels have been tagged with: 0.32 and 0.33 are 2_28, 0.20 was 2_35, 0.12 to 0.19 were 2_31.
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_31_x86_64", "manylinux_2_35_x86_64")

# Our file -> rows "verb object names". The object is a name our file imports, or module:name without the leading "vllm.". Verbs:
#   has    the class or one of its bases has these members, attributes set on self included
#   takes  the callable's positional parameters, or the dataclass's fields, begin with these names in this order
#   reads  its code mentions these names of ours: hooks and settings that do nothing unless vLLM asks for them
RELIED_ON = {
    "registration.py": """
        has model_executor.models.registry:_ModelRegistry get_supported_archs register_model
        reads config:ModelConfig verify_and_update_model_config
        reads config:VllmConfig verify_and_update_config
        has config:VllmConfig model_config scheduler_config parallel_config cache_config attention_config diffusion_config
        has config:VllmConfig additional_config kv_transfer_config ec_transfer_config speculative_config lora_config
        has config:VllmConfig watermark_config use_v2_model_runner
        has config.diffusion:DiffusionConfig canvas_length max_denoising_steps
        has config:AttentionConfig use_non_causal
        has config:CacheConfig mamba_cache_mode use_replayssm
        has config:ModelConfig logits_processors max_model_len
        has config:ParallelConfig pipeline_parallel_size tensor_parallel_size data_parallel_size enable_expert_parallel
        has config:ParallelConfig decode_context_parallel_size prefill_context_parallel_size enable_dbo ubatch_size
        has config:ParallelConfig enable_batch_sharded_sampling worker_extension_cls
        has config:SchedulerConfig async_scheduling max_num_seqs DEFAULT_MAX_NUM_SEQS policy max_num_batched_tokens
        has config:SchedulerConfig max_num_scheduled_tokens long_prefill_token_threshold scheduler_cls
        has platforms.interface:Platform is_cpu""",
    "compat.py": """
        has v1.kv_cache_interface:MambaSpec num_prefill_checkpoint_blocks prefill_checkpoint_alignment
        has model_executor.layers.mamba.mamba_mixer2:MambaMixer2 get_kv_cache_spec ssm_state_size
        has model_executor.models.nemotron_h:NemotronHMambaDecoderLayer mixer
        has v1.outputs:ModelRunnerOutput prompt_logprobs_dict prompt_token_id_logprobs_dict
        reads model_executor.models.nemotron_h:NemotronHModel ALL_DECODER_LAYER_TYPES""",
    "models/twotower.py": """
        reads v1.worker.gpu.model_states:resolve_model_state_cls get_model_state_cls
        reads model_executor.model_loader.default_loader:DefaultModelLoader allow_patterns_overrides load_weights
        has model_executor.models.nemotron_h:NemotronHModel layers
        takes AutoWeightsLoader.load_weights weights mapper
        has forward_context:ForwardContext attn_metadata""",
    "models/portable_moe.py": """
        reads model_executor.models.nemotron_h:NemotronHForCausalLM n_routed_experts n_logical_experts n_physical_experts
        reads model_executor.models.nemotron_h:NemotronHForCausalLM n_local_physical_experts n_redundant_experts n_shared_experts
        reads NemotronHMoEDecoderLayer.forward mixer norm
        reads model_executor.models.utils:AutoWeightsLoader load_weights""",
    "models/denoiser_tower.py": """
        has model_executor.models.nemotron_h:NemotronHAttention q_size kv_size attn
        has model_executor.layers.mamba.mamba_mixer2:MambaMixer2 kv_cache prefix conv_kernel_size head_dim ssm_state_size
        has config:ModelConfig hf_config
        takes NemotronHMLP config hidden_size intermediate_size quant_config bias
        takes NemotronHMoE config quant_config parallel_config prefix
        takes Mixer2RMSNormGated full_hidden_size full_n_groups
        takes LogitsProcessor.forward lm_head hidden_states
        takes mamba_v2_sharded_weight_loader shard_spec tp_size tp_rank""",
    "runtime/admission.py": """
        reads v1.worker.gpu.sample.logits_processor.loader:build_custom_logits_processors_params_validator validate_params
        has SamplingParams logprob_token_ids thinking_token_budget""",
    "runtime/model_state.py": """
        reads v1.worker.gpu.model_runner:GPUModelRunner add_request remove_request preprocess_state prepare_attn
        reads v1.worker.gpu.model_runner:GPUModelRunner prepare_inputs postprocess_state custom_sampler get_additional_cg_support
        has sampling_params:SamplingParams extra_args seed temperature
        has v1.worker.utils:AttentionGroup kv_cache_spec
        has v1.kv_cache_interface:KVCacheGroupSpec kv_cache_spec layer_names
        has config:CacheConfig mamba_block_size
        has config:ModelConfig seed""",
    "runtime/sampler.py": """
        takes v1.worker.gpu.sample.sampler:Sampler.__call__ logits input_batch
        takes SamplerOutput sampled_token_ids logprobs_tensors num_nans num_sampled num_rejected
        has v1.worker.gpu.sample.sampler:Sampler req_states
        has v1.worker.gpu.states:RequestState prefill_len prompt_len
        has v1.worker.gpu.buffer_utils:UvaBackedTensor np copy_to_uva""",
    "runtime/scheduler.py": """
        reads Scheduler.schedule spec_token_ids max_num_active_reqs num_sampled_tokens_per_step _update_after_schedule
        reads Scheduler.update_from_output _free_request
        has Request request_id num_tokens num_computed_tokens num_output_tokens spec_token_ids
        has SchedulerOutput total_num_scheduled_tokens finished_req_ids preempted_req_ids scheduled_spec_decode_tokens
        has v1.outputs:ModelRunnerOutput req_ids req_id_to_index sampled_token_ids""",
    "runtime/worker_extension.py": """
        has v1.worker.gpu_worker:Worker model_runner
        has v1.worker.gpu.model_runner:GPUModelRunner model_state""",
}


def statements(node: ast.AST) -> Iterator[ast.stmt]:
    """The statements of a module or class, with those inside ``if``, ``try`` and ``with``: all bind names of the same scope."""
    for part in ("body", "handlers", "orelse", "finalbody"):
        for child in getattr(node, part, []):
            yield child
            if not isinstance(child, ast.FunctionDef | ast.ClassDef):
                yield from statements(child)


class Sources:
    """The modules of one vLLM, and ours beside them; looks names up as an import would."""

    def __init__(self, root: pathlib.Path | zipfile.Path) -> None:
        self.root = root
        self.modules: dict[str, ast.Module | None] = {}
        self.packages: set[str] = set()
        self.tables: dict[str, dict] = {}

    def module(self, name: str) -> ast.Module | None:
        if name not in self.modules:
            root, stem = ROOT if name.split(".")[0] == PACKAGE else self.root, name.replace(".", "/")
            package, plain = root / f"{stem}/__init__.py", root / f"{stem}.py"
            path = package if package.is_file() else plain
            self.modules[name] = ast.parse(path.read_text(encoding="utf-8")) if path.is_file() else None
            self.packages |= {name} if path is package else set()
        return self.modules[name]

    def names(self, module: str) -> dict:
        """What a module defines: name -> its statement, or (module, name) of what it imports ("" for a whole module)."""
        if module not in self.tables:
            found = self.tables[module] = {}
            for node in statements(self.module(module) or ast.Module([], [])):
                for name, value in self.bindings(module, node):
                    found.setdefault(name, value)  # the first: what TYPE_CHECKING sees comes before any fallback
        return self.tables[module]

    def bindings(self, module: str, node: ast.AST) -> Iterator[tuple[str, object]]:
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

    def has(self, module: str, name: str) -> bool:
        """Whether ``from module import name`` works."""
        found = name in self.names(module) or self.module(f"{module}.{name}") is not None
        return found if name else self.module(module) is not None

    def resolve(self, module: str, name: str) -> tuple[str, ast.AST | None]:
        """Follow re-exports and dots (``Class.method``) to the definition and the module that holds it."""
        first, _, rest = name.partition(".")
        value = self.names(module).get(first)
        if isinstance(value, tuple):
            return self.resolve(value[0], ".".join(p for p in (value[1], rest) if p))
        if rest and isinstance(value, ast.ClassDef):
            methods = ((m, n) for m, c in self.lineage(module, value) for n in c.body if getattr(n, "name", "") == rest)
            return next(methods, (module, None))
        return module, None if rest else value

    def lineage(self, module: str, cls: ast.ClassDef) -> Iterator[tuple[str, ast.ClassDef]]:
        """A class and its bases, as far as they are vLLM's or ours."""
        yield module, cls
        for base in cls.bases:
            where, node = self.resolve(module, ast.unparse(base).partition("[")[0])
            if isinstance(node, ast.ClassDef):
                yield from self.lineage(where, node)

    def members(self, module: str, cls: ast.ClassDef) -> set[str]:
        found: set[str] = set()
        for where, node in self.lineage(module, cls):
            found |= {name for s in statements(node) for name, _ in self.bindings(where, s)}
            stores = (n for n in ast.walk(node) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store))
            found |= {n.attr for n in stores if ast.unparse(n.value) == "self"}
        return found

    def parameters(self, module: str, name: str) -> ast.arguments | None:
        """Of a function, a method or a class (its fields, where it has no ``__init__``), ``self`` left out."""
        where, node = self.resolve(module, name)
        if isinstance(node, ast.ClassDef):
            init = self.resolve(where, f"{node.name}.__init__")[1]
            fields = [s for _, c in [*self.lineage(where, node)][::-1] for s in c.body if isinstance(s, ast.AnnAssign)]
            given = ast.arguments([], [ast.arg(ast.unparse(s.target)) for s in fields], None, [], [], None, [])
            return without_self(init) if isinstance(init, ast.FunctionDef) else given
        return without_self(node) if isinstance(node, ast.FunctionDef) else None


def without_self(function: ast.FunctionDef) -> ast.arguments:
    a = function.args
    return ast.arguments([], [p for p in a.args if p.arg not in ("self", "cls")], a.vararg, a.kwonlyargs, [], a.kwarg, [])


def accepts(ours: ast.arguments, theirs: ast.arguments) -> bool:
    """Whether calls that fit vLLM's signature fit ours; what only our ``**kwargs`` takes has to come by keyword."""
    mine, wanted = [p.arg for p in ours.args], [p.arg for p in theirs.args]
    open_ended = ours.vararg or ours.kwarg
    same_order = [n for n in wanted if n in mine] == mine if open_ended else mine[: len(wanted)] == wanted
    keyword_only = {p.arg for p in theirs.kwonlyargs} - {p.arg for p in [*ours.args, *ours.kwonlyargs]}
    stars = (not theirs.vararg or ours.vararg) and (not (theirs.kwarg or keyword_only) or ours.kwarg)
    return bool(same_order and stars)


class Checker:
    """Walks our modules and keeps what the vLLM at hand lacks, each name once."""

    def __init__(self, root: pathlib.Path | zipfile.Path) -> None:
        self.sources = Sources(root)
        self.count = 0
        self.missing: dict[str, str] = {}

    def expect(self, ok: object, where: str, name: str, problem: str = "is missing") -> None:
        self.count += 1
        if not ok:
            self.missing.setdefault(name, f"{where}: {name} {problem}")

    def run(self) -> None:
        for path in sorted((ROOT / PACKAGE).rglob("*.py")):
            self.file, self.label = path.relative_to(ROOT / PACKAGE).as_posix(), path.relative_to(ROOT).as_posix()
            self.name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            self.tree = self.sources.module(self.name) or ast.Module([], [])
            self.imported: dict[str, tuple[str, str]] = {}
            self.check_imports()
            self.check_members()
            self.check_calls()
            self.check_overrides()
            self.check_table()

    def where(self, node: ast.AST) -> str:
        return f"{self.label}:{getattr(node, 'lineno', 1)}"

    def check_imports(self) -> None:
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                for name, (module, original) in self.sources.bindings(self.name, node):
                    if module.split(".")[0] == "vllm":
                        self.imported[name] = module, original
                        self.expect(self.sources.has(module, original), self.where(node), f"{module}.{original}".rstrip("."))

    def definition(self, name: str) -> tuple[str, ast.AST | None]:
        """What a name means in the module at hand, wherever in it it is imported."""
        module, original = self.imported.get(name, (self.name, name))
        return self.sources.resolve(module, original)

    def check_members(self) -> None:
        """``x.attribute`` where x is self, a parameter annotated with a vLLM class, an imported class or an imported module."""
        owners = [self.tree, *(n for n in ast.walk(self.tree) if isinstance(n, ast.ClassDef))]
        for owner, function in ((o, f) for o in owners for f in o.body if isinstance(f, ast.FunctionDef)):
            types = {p.arg: ast.unparse(p.annotation).strip("'\"") for p in function.args.args if p.annotation}
            types |= {"self": owner.name} if isinstance(owner, ast.ClassDef) else {}
            for node in ast.walk(function):
                if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                    self.check_member(node, types.get(node.value.id, node.value.id))

    def check_member(self, node: ast.Attribute, owner: str) -> None:
        module, original = self.imported.get(owner, ("", ""))
        path = f"{module}.{original}".rstrip(".")
        where, cls = self.definition(owner)
        if isinstance(cls, ast.ClassDef) and any(m.split(".")[0] == "vllm" for m, _ in self.sources.lineage(where, cls)):
            self.expect(node.attr in self.sources.members(where, cls), self.where(node), f"{where}.{cls.name}.{node.attr}")
        elif module and self.sources.module(path):
            self.expect(self.sources.has(path, node.attr), self.where(node), f"{path}.{node.attr}")

    def check_calls(self) -> None:
        for call in ast.walk(self.tree):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in self.imported:
                module, name = self.imported[call.func.id]
                takes = self.sources.parameters(module, name)
                if takes is None:
                    continue
                known = {p.arg for p in [*takes.args, *takes.kwonlyargs]}
                for keyword in (k.arg for k in call.keywords if k.arg and not takes.kwarg):
                    self.expect(keyword in known, self.where(call), f"{module}.{name}({keyword}=)")
                fits = takes.vararg or len(call.args) <= len(takes.args)
                self.expect(fits, self.where(call), f"{module}.{name}", f"takes {len(takes.args)} positional arguments")

    def check_overrides(self) -> None:
        for cls in (n for n in self.tree.body if isinstance(n, ast.ClassDef)):
            for base in (b for b in cls.bases if ast.unparse(b) in self.imported):
                module, name = self.imported[ast.unparse(base)]
                where, theirs = self.sources.resolve(module, name)
                self.expect(isinstance(theirs, ast.ClassDef), self.where(cls), f"{module}.{name}", "is no longer a class")
                for ours in (m for m in cls.body if isinstance(m, ast.FunctionDef)):
                    takes = self.sources.parameters(module, f"{name}.{ours.name}")
                    if takes is not None:
                        ok = accepts(without_self(ours), takes)
                        problem = f"takes ({ast.unparse(takes)}), ours ({ast.unparse(without_self(ours))})"
                        self.expect(ok, self.where(ours), f"{where}.{name}.{ours.name}", problem)

    def check_table(self) -> None:
        for row in RELIED_ON.get(self.file, "").strip().splitlines():
            verb, target, *names = row.split()
            module, _, qualname = target.rpartition(":")
            if module:
                module = f"vllm.{module}"
            else:
                first, _, rest = qualname.partition(".")
                module, original = self.imported.get(first, ("vllm", first))
                qualname = f"{original}.{rest}".rstrip(".")
            self.check_row(verb, module, qualname, names)

    def check_row(self, verb: str, module: str, qualname: str, names: list[str]) -> None:
        where, node = self.sources.resolve(module, qualname)
        if node is None:
            self.expect(False, self.where_used(qualname.split(".")[-1], names), f"{module}.{qualname}")
        elif verb == "takes":
            takes = self.sources.parameters(module, qualname)
            found = [p.arg for p in takes.args][: len(names)] if takes else []
            self.expect(found == names, self.where_used(qualname), f"{module}.{qualname}", f"begins with {found}, not {names}")
        else:
            known = self.sources.members(where, node) if verb == "has" else mentions(node)
            for name in names:
                self.expect(name in known, self.where_used(name), f"{module}.{qualname}" + f".{name}" * (verb == "has"))
