"""What shims say about themselves, read from their docstrings: nothing is imported, neither vLLM nor the package."""

import ast
import pathlib
import re
from dataclasses import dataclass

PACKAGE = pathlib.Path(__file__).resolve().parents[1] / "vllm_twotower"
FILES = [
    *sorted(PACKAGE.glob("compat/*.py")),
    PACKAGE / "cpu" / "shims.py",
    PACKAGE / "cpu" / "triton_interpreter" / "driver.py",
]
HEADINGS = ("Symptom", "Upstream", "Removed when", "Test")


@dataclass(frozen=True)
class Shim:
    file: str
    """In the package."""
    name: str
    says: dict[str, str]
    """``Change``, its docstring's first paragraph, and the four headings: text."""
    touched: dict[str, str]
    """Dotted name of vLLM's -> the test that guards it. ``Upstream`` lists them, or names the file's table of them, in
    which each has a test of its own, in the file that ``Test`` names."""


def _read_table(module: ast.Module, name: str) -> dict[str, str]:
    """Names -> tests of a module's ``{owner: {name: (_, test)}}``."""
    (table,) = (n.value for n in module.body if isinstance(n, ast.AnnAssign) and ast.unparse(n.target) == name)
    return {
        f"{ast.literal_eval(owner)}.{ast.literal_eval(key)}": ast.literal_eval(row.elts[1])
        for owner, rows in zip(table.keys, table.values, strict=True)
        for key, row in zip(rows.keys, rows.values, strict=True)
    }


def read_shims() -> list[Shim]:
    """Functions and classes with a section, in the order of ``FILES``."""
    shims = []
    for path in FILES:
        module = ast.parse(path.read_text(encoding="utf-8"))
        for node in module.body:
            doc = (ast.get_docstring(node) or "") if isinstance(node, ast.FunctionDef | ast.ClassDef) else ""
            if "\nSymptom:" not in doc:
                continue
            doc = doc.split("\nArgs:")[0].split("\nReturns:")[0]
            change, *rest = re.split(rf"^({'|'.join(HEADINGS)}):", doc, flags=re.M)
            says = {"Change": change, **dict(zip(rest[::2], rest[1::2], strict=True))}
            says = {heading: " ".join(text.split()).replace("``", "`") for heading, text in says.items()}
            upstream, test = says["Upstream"], says["Test"]
            if upstream.isidentifier():
                touched = {name: f"{test}::{own}" for name, own in _read_table(module, upstream).items()}
            else:
                touched = dict.fromkeys(upstream.split(", "), test)
            shims.append(Shim(path.relative_to(PACKAGE).as_posix(), node.name, says, touched))
    return shims
