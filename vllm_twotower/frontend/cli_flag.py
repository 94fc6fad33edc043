"""The ``--diffusion`` flag of ``vllm serve``, ``vllm bench`` and all else that is built on vLLM's engine arguments.

Called through ``compat.extend_engine_args``: where the options are declared ours is added, where they are read ours
goes into ``additional_config``, whatever the order on the command line, and where the configuration has been built
another model is refused.
"""

import argparse
import json
from typing import TYPE_CHECKING, Any

from vllm_twotower.config import CONFIG_KEY, EngineOptions
from vllm_twotower.planning.model_facts import ARCHITECTURE

if TYPE_CHECKING:
    from vllm.engine.arg_utils import EngineArgs

FLAG = "--diffusion"
DESTINATION = "twotower_diffusion"


class FromFlag(dict):
    """An ``additional_config`` that the flag wrote; engine arguments are copied field by field, so the mark is here."""


def add_flag(parser: argparse.ArgumentParser) -> None:
    """Declare ``--diffusion``, which argparse would otherwise take for an abbreviation of ``--diffusion-config``."""
    if FLAG in parser._option_string_actions:
        return
    parser.add_argument(
        FLAG,
        dest=DESTINATION,
        nargs="?",
        const=True,
        default=None,
        type=parse_options,
        metavar="JSON",
        help="Decode a two-tower model by mask diffusion; engine options as JSON, for example "
        '{"canvas_length": 16, "confidence_threshold": 0.8}.',
    )


def parse_options(text: str) -> Any:
    """Read the flag's value.

    Raises:
        argparse.ArgumentTypeError: not JSON, an unknown option, or a value out of range; one line.

    """
    try:
        value = json.loads(text)
        EngineOptions.from_additional_config(value)
    except json.JSONDecodeError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not JSON; write options as '{{\"canvas_length\": 16}}', "
            "and a bare --diffusion after the model"
        ) from None
    except ValueError as problem:
        raise argparse.ArgumentTypeError(str(problem)) from None
    return value


def merge_flag(engine_args: "EngineArgs", namespace: argparse.Namespace) -> None:
    """Put the flag's value where all engines look for it, in the parsed arguments too.

    A server of several API processes (the default with data parallelism) gives each the parsed arguments, and there
    they are read before any plugin is loaded, hence without this function.

    Raises:
        ValueError: ``--additional-config`` configures diffusion too, and differently.

    """
    given = getattr(namespace, DESTINATION, None)
    if given is None:
        return
    extra = dict(engine_args.additional_config or {})
    if extra.get(CONFIG_KEY, given) != given:
        raise ValueError(
            f"{FLAG} says {given!r} and additional_config[{CONFIG_KEY!r}] says {extra[CONFIG_KEY]!r}: keep one of them"
        )
    extra[CONFIG_KEY] = given
    engine_args.additional_config = namespace.additional_config = FromFlag(extra)


def check_architecture(engine_args: "EngineArgs", architecture: str) -> None:
    """Refuse the flag on somebody else's model, which would ignore it.

    Raises:
        ValueError: the flag was given and the model is not a two-tower one.

    """
    if isinstance(engine_args.additional_config, FromFlag) and architecture != ARCHITECTURE:
        raise ValueError(
            f"{FLAG} needs a two-tower model ({ARCHITECTURE}), and {engine_args.model} is a {architecture}: "
            f"leave out {FLAG}"
        )
