"""README's example, run as it stands, prints what README says."""

import os
import pathlib
import re
import subprocess
import sys

README = pathlib.Path(__file__).resolve().parents[1] / "README.md"


def test_the_example_prints_what_readme_says(tmp_path):
    text = README.read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    printed = re.search(r"```text\n(.*?)```", text, re.DOTALL)[1]
    script = tmp_path / "example.py"
    script.write_text(code)
    as_users_have_it = {k: v for k, v in os.environ.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    result = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=as_users_have_it,
        cwd=README.parent,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert {line.strip() for line in printed.splitlines()} <= {line.strip() for line in result.stdout.splitlines()}


def test_the_files_to_read_exist():
    links = re.findall(r"\]\(([\w./-]+)(?:#\w+)?\)", README.read_text(encoding="utf-8"))
    assert len(links) > 10
    assert [link for link in links if not (README.parent / link).exists()] == []
