"""Make ``.venv-rehearsal``: what of vLLM's CUDA wheels the rehearsal needs (``tests/rehearsal``), without CUDA.

    make rehearsal        # makes it, and runs the rehearsal

One folder for each supported vLLM, put before the packages of ``.venv`` by ``PYTHONPATH``: the wheel's Python files,
and, in place of its compiled libraries, which no machine without CUDA can load, the declarations of their operators:
names, arguments and results, as they stand in the libraries. Beside it the Python of the FlashInfer that this vLLM
wants, without the sources of its kernels. 275 MB a version; the wheels, 400 MB, are fetched and not kept.
"""

import argparse
import json
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile

from tools.vllm_source import download_wheel

ROOT = pathlib.Path(__file__).resolve().parents[1]
TARGET = ROOT / ".venv-rehearsal"
VERSIONS = ("0.33.0",)
OPERATORS = "operators.json"
"""Module name of a library -> the declarations in it."""

TEXT = re.compile(rb"[\x20-\x7e\n]{8,}")
DECLARATION = re.compile(r"\s*[A-Za-z_]\w*(?:\.\w+)?\s*\(.*\)\s*->\s*.*", re.DOTALL)


def find_declarations(library: bytes) -> list[str]:
    """The operator declarations among a library's strings, on one line each."""
    texts = (match.decode("ascii") for match in TEXT.findall(library))
    return sorted({" ".join(text.split()) for text in texts if DECLARATION.fullmatch(text)})


def unpack(wheel: pathlib.Path, target: pathlib.Path) -> None:
    """Take Python, data and metadata out of a wheel, and of its libraries what operators they declare."""
    shutil.rmtree(target, ignore_errors=True)
    declared = {}
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.endswith(".so"):
                module = name.split(".")[0].replace("/", ".")
                declared[module] = find_declarations(archive.read(name))
            else:
                archive.extract(name, target)
    (target / OPERATORS).write_text(json.dumps(declared, indent=1), encoding="utf-8")


def add_flashinfer(target: pathlib.Path, folder: pathlib.Path) -> None:
    """Put the Python of the FlashInfer that a vLLM asks for beside it, and what it needs to be imported."""
    metadata = next(target.glob("vllm-*.dist-info")) / "METADATA"
    pinned = re.search(r"^Requires-Dist: (flashinfer-python==\S+)", metadata.read_text(encoding="utf-8"), re.MULTILINE)
    if pinned is None:
        raise SystemExit(f"{metadata} pins no FlashInfer: see what this vLLM uses instead")
    pip = [sys.executable, "-m", "pip"]
    command = [*pip, "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(folder)]
    subprocess.run([*command, pinned[1], "nvidia-ml-py"], check=True)
    for wheel in (*folder.glob("flashinfer_python-*.whl"), *folder.glob("nvidia_ml_py-*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(target, [n for n in archive.namelist() if not n.startswith("flashinfer/data/")])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheels", type=pathlib.Path, help="a folder with already downloaded ones")
    parser.add_argument("versions", nargs="*", default=VERSIONS)
    args = parser.parse_args()
    for version in args.versions:
        with tempfile.TemporaryDirectory() as folder:
            found = sorted(args.wheels.glob(f"vllm-{version}-*.whl")) if args.wheels else []
            unpack(found[0] if found else download_wheel(version, folder), TARGET / version)
            add_flashinfer(TARGET / version, pathlib.Path(folder))
        print(f"{TARGET.name} has vLLM {version}")


if __name__ == "__main__":
    main()
