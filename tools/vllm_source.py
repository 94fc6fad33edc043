"""vLLM as it is published: its wheel, and its source distribution, which has the tests and tuning scripts too."""

import importlib.metadata
import io
import pathlib
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Sequence

PLATFORM = "manylinux_2_28_x86_64"
"""What the wheels of 0.32 and 0.33 are tagged with."""

VERSION = importlib.metadata.version("vllm").split("+")[0]
"""Of the vLLM that is installed, as its source distribution is called."""


def fetch_source(version: str) -> bytes:
    """vLLM's source distribution, from wherever pip is told to look.

    ``pip download`` would build its metadata, for which it wants a compiler's worth of requirements; so pip finds the
    file and reads it, and does nothing else.
    """
    from pip._internal.commands import create_command
    from pip._vendor.packaging.specifiers import SpecifierSet

    command = create_command("download")
    with command.main_context():
        options, _ = command.parse_args(["--no-deps", "--no-binary", ":all:"])
        session = command.get_default_session(options)
        finder = command._build_package_finder(options, session)
        found = finder.find_best_candidate("vllm", SpecifierSet(f"=={version}")).best_candidate
        if found is None:
            raise SystemExit(f"pip finds no source distribution of vllm {version}")
        answer = session.get(found.link.url_without_fragment)
        answer.raise_for_status()
        return answer.content


def walk_source(archive: bytes) -> Iterator[tuple[pathlib.PurePosixPath, bytes]]:
    """Every file of a source distribution, by its path in it."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        for member in tar:
            path = pathlib.PurePosixPath(*pathlib.PurePosixPath(member.name).parts[1:])
            if member.isfile() and ".." not in path.parts:
                yield path, tar.extractfile(member).read()


def read_source(paths: Sequence[str]) -> dict[str, bytes]:
    """Some files of the installed vLLM's source distribution, fetched."""
    found = {str(path): content for path, content in walk_source(fetch_source(VERSION)) if str(path) in paths}
    if missing := set(paths) - found.keys():
        raise SystemExit(f"vllm {VERSION} has no {', '.join(sorted(missing))}: see what took its place")
    return found


def download_wheel(version: str, folder: str) -> pathlib.Path:
    """Fetch vLLM's wheel for CUDA."""
    print(f"downloading vllm {version}, several hundred MB", file=sys.stderr)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    subprocess.run([*command, "--platform", PLATFORM, "--dest", folder, f"vllm=={version}"], check=True)
    return next(pathlib.Path(folder).glob("vllm-*.whl"))
