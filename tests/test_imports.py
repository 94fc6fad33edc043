"""Which part of the package may import which: directions, and no circles, read from the source."""

import ast
import pathlib
import subprocess
import sys

import pytest

import vllm_twotower

ROOT = pathlib.Path(vllm_twotower.__file__).parent
NAME = "vllm_twotower"


def module_name(path: pathlib.Path) -> str:
    return ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in ROOT.rglob("*.py")}


def imports_of(module: str) -> set[str]:
    """All modules that a module of ours imports anywhere in its text: ours by their full names, others by the first
    part."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            inner = {f"{node.module}.{alias.name}" for alias in node.names} & MODULES.keys()
            found |= inner
            if len(inner) < len(node.names):
                found.add(node.module)
    return {name if name in MODULES else name.split(".")[0] for name in found}


IMPORTS = {module: imports_of(module) for module in MODULES}


def part_of(module: str) -> str:
    """``ops`` for ``vllm_twotower.ops.reveal.kernel``, ``core`` for ``vllm_twotower.core``; others as they are."""
    return module.split(".")[1] if module.startswith(f"{NAME}.") else module


def test_there_are_no_circles():
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module in done or module not in MODULES:
            return
        for other in sorted(IMPORTS[module]):
            visit(other, (*path, module))
        done.add(module)

    for module in sorted(MODULES):
        visit(module, ())
    assert done == set(MODULES)


ABOVE = {"cpu", "split", "oracle", "frontend", "commands", "planning", "registration"}
ALLOWED = {  # of ours, besides itself
    "core": set(),
    "config": {"core"},
    "decoding": {"core"},
    "ops": {"core", "decoding"},
    "oracle": {"core", "decoding"},
    "compat": {"core", "config"},
    "frontend": {"core", "config", "compat", "planning", "models"},
    # Of these the modules form no circles, but the parts do. ``models.entry`` chooses between the model of ``models``
    # and that of ``split``, which extends it; the towers take ``runtime.step``'s nouns, while ``runtime`` asks
    # ``models`` what a Mamba layer is made of; ``cpu`` reads the layouts of ``models``, which enters the shims of
    # ``cpu`` where it builds a model.
    "cpu": {"core", "models", "ops"},
    "models": {"core", "config", "compat", "cpu", "decoding", "ops", "registration", "runtime", "split"},
    "split": {"core", "config", "compat", "cpu", "models", "runtime"},
    "planning": {"core", "config", "models", "runtime"},
    "commands": {"core", "config", "models", "planning", "runtime", NAME},
}


@pytest.mark.parametrize("part", ALLOWED)
def test_lower_parts_know_nothing_of_higher_ones(part):
    for module in MODULES:
        if part_of(module) == part:
            ours = {part_of(other) for other in IMPORTS[module] if other in MODULES} - {part}
            assert ours <= ALLOWED[part], f"{module} imports {ours - ALLOWED[part]}"


def test_runtime_does_not_know_the_wings():
    modules = [module for module in MODULES if part_of(module) == "runtime"]
    assert modules
    for module in modules:
        assert not {part_of(other) for other in IMPORTS[module]} & ABOVE, module


def test_the_towers_know_of_a_step_its_nouns_only():
    """The model hands out the model state's class, which is imported when it is asked for."""
    for module in [module for module in MODULES if part_of(module) == "models"]:
        of_runtime = {other for other in IMPORTS[module] if part_of(other) == "runtime"}
        assert of_runtime <= {f"{NAME}.runtime.step", f"{NAME}.runtime.model_state"}, module


def test_towers_do_not_know_the_oracle():
    """It judges them."""
    for module in [module for module in MODULES if part_of(module) in ("models", "split")]:
        assert "oracle" not in {part_of(other) for other in IMPORTS[module]}, module


@pytest.mark.parametrize(
    ("part", "heavy"),
    [
        ("ops", {"vllm"}),
        ("oracle", {"vllm"}),
        ("decoding", {"vllm"}),
        ("core", {"torch", "vllm"}),
        ("config", {"torch", "vllm"}),
    ],
)
def test_nothing_heavy_is_imported_anywhere_in_their_text(part, heavy):
    """In kernels and inside functions neither."""
    modules = [module for module in MODULES if part_of(module) == part]
    assert modules
    for module in modules:
        assert not IMPORTS[module] & heavy, module


@pytest.mark.parametrize("part", ["ops", "oracle", "decoding", "planning", "frontend"])
def test_what_needs_no_vllm_imports_none(part):
    """At import; the front desk asks vLLM a few things when it is called. Kernels import Triton when they run."""
    modules = [m for m in MODULES if part_of(m) == part and not m.endswith(".kernel")]
    heavy = {"vllm", "torch"} if part in ("planning", "frontend") else {"vllm"}
    code = f"import sys, {', '.join(modules)}; found = {heavy!r} & set(sys.modules); assert not found, found"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_denoise_loop_knows_nothing_of_the_cpu_wing():
    """Triton loads the interpreter's backend, and with it the wing's empty ``__init__``, wherever it is imported."""
    code = "import sys, vllm_twotower.runtime.denoise_loop; wing = 'vllm_twotower.cpu.'"
    code += "; found = [m for m in sys.modules if m.startswith(wing) and not m.startswith(wing + 'triton_interpreter')]"
    code += "; assert not found, found"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_registration_is_light():
    code = "import sys, vllm_twotower, vllm_twotower.registration, vllm_twotower.commands.cli as cli"
    code += "; found = {'torch', 'vllm', 'triton'} & set(sys.modules); assert not found, found"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_tools_benchmarks_and_tests_find_what_they_import_of_each_other():
    """Most of their modules no test imports, and a name that is gone would be missed by the next who runs one."""
    names: dict[str, set[str]] = {}
    others = [path for folder in ("tools", "benchmarks", "tests") for path in (ROOT.parent / folder).rglob("*.py")]
    paths = MODULES | {module_name(path): path for path in others}
    trees = {module: ast.parse(path.read_text(encoding="utf-8")) for module, path in paths.items()}
    for module, tree in trees.items():
        found = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        found |= {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
        names[module] = found | {alias.asname or alias.name for node in imports for alias in node.names}
    for module, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module in paths:
                for alias in node.names:
                    there = alias.name in names[node.module] or f"{node.module}.{alias.name}" in paths
                    assert there, f"{module} imports {alias.name}, which {node.module} has not"
