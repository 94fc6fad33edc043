"""Fail on files of the package that grew beyond what is read in one go: 500 lines outside ``models/``, functions of 60
lines and 12 parameters. The signature of a Triton kernel does not count: pointers and strides are all it can be given.
"""

import ast
import pathlib
import sys

PACKAGE = pathlib.Path(__file__).resolve().parents[1] / "vllm_twotower"
MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 60
MAX_PARAMETERS = 12


def is_kernel(node: ast.FunctionDef) -> bool:
    return any(ast.unparse(d) == "triton.jit" for d in node.decorator_list)


def problems(path: pathlib.Path) -> list[str]:
    text = path.read_text(encoding="utf-8")
    name = path.relative_to(PACKAGE.parent)
    found = []
    num_lines = text.count("\n")
    if num_lines > MAX_FILE_LINES and "models" not in path.parts:
        found.append(f"{name}: {num_lines} lines, at most {MAX_FILE_LINES}")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            first_line = node.body[0].lineno if is_kernel(node) else node.lineno
            length = (node.end_lineno or 0) - first_line + 1
            if length > MAX_FUNCTION_LINES:
                found.append(f"{name}:{node.lineno}: {node.name} has {length} lines, at most {MAX_FUNCTION_LINES}")
            count = len(node.args.args) + len(node.args.kwonlyargs)
            if count > MAX_PARAMETERS and not is_kernel(node):
                found.append(f"{name}:{node.lineno}: {node.name} takes {count} parameters, at most {MAX_PARAMETERS}")
    return found


def main() -> None:
    found = [p for path in sorted(PACKAGE.rglob("*.py")) for p in problems(path)]
    print("\n".join(found) or "sizes are fine")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
