"""How a function of vLLM's is replaced: the new one gets the old one, and whatever upstream's callers pass."""

import functools
import inspect
from collections.abc import Callable
from typing import Any


def wrap(owner: Any, name: str) -> Callable[[Callable[..., Any]], None]:
    """Replace ``owner.name`` by a function that is called with the replaced one and then with the caller's arguments.

    What was a static or a class method stays one; without its class's help, a wrapper finds a parameter by
    ``find_argument``.
    """
    found = inspect.getattr_static(owner, name)
    kind = type(found) if isinstance(found, staticmethod | classmethod) else lambda function: function
    upstream = getattr(found, "__func__", found)

    def replace(wrapper: Callable[..., Any]) -> None:
        @functools.wraps(upstream)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            return wrapper(upstream, *args, **kwargs)

        setattr(owner, name, kind(wrapped))

    return replace


def find_argument(function: Callable[..., Any], name: str, *args: Any, **kwargs: Any) -> Any:
    """What a call with these arguments passes as ``name``, by position or by keyword."""
    return _signature(function).bind(*args, **kwargs).arguments[name]


_signature = functools.cache(inspect.signature)  # every request comes this way
