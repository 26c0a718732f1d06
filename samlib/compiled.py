"""torch.compile where there is a compiler, and the same function without it where there is none."""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch

_warned = False


def compiled(function: Callable, **options: Any) -> Callable:
    """torch.compile(function); falls back to the function itself, with one warning a process, if that cannot work."""
    fast = torch.compile(function, **options)
    works: bool | None = None

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal works
        if works is False:
            return function(*args, **kwargs)
        try:
            result = fast(*args, **kwargs)
        except Exception as error:  # the compiler's own: which ones depends on what is missing
            if works or not _from_compiler(error):
                raise
            works = False
            _warn(error)
            return function(*args, **kwargs)
        works = True
        return result

    return call


def _from_compiler(error: Exception) -> bool:
    return type(error).__module__.startswith(("torch._dynamo", "torch._inductor"))


def _warn(error: Exception) -> None:
    global _warned
    if not _warned:
        _warned = True
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        warnings.warn(f"torch.compile does not work here, going on without it: {reason}", stacklevel=3)
