"""vLLM's source distribution: its tests and its tuning scripts, which no wheel has."""

import importlib.metadata
import io
import pathlib
import tarfile
from collections.abc import Iterator, Sequence

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
