"""Calls in processes of their own, where nothing has been allocated or loaded before.

Nothing here imports torch: the process that waits stays small.
"""

from __future__ import annotations

import importlib
import multiprocessing
import traceback
from typing import Any

# Started anew, not forked: no process inherits another's threads, memory or device.
_CONTEXT = multiprocessing.get_context("spawn")


def call_apart(function: str, arguments: tuple[Any, ...], seconds: float) -> Any:
    """Call "package.module:function" in a process of its own; returns its result.

    Raises:
        RuntimeError: the call raised something (its traceback has been printed), took more than
            ``seconds``, or its process ended.
    """
    receiver, sender = _CONTEXT.Pipe(duplex=False)
    process = _CONTEXT.Process(target=_answer, args=(function, arguments, sender), daemon=True)
    process.start()
    sender.close()
    try:
        if not receiver.poll(seconds):
            raise RuntimeError(f"not done after {seconds:.0f} s")
        result, error = receiver.recv()
    except EOFError:
        process.join()
        code = process.exitcode
        raise RuntimeError(f"the process of {function} ended with exit code {code}") from None
    finally:
        process.terminate()
        process.join()
    if error is not None:
        raise RuntimeError(error)
    return result


def _answer(function: str, arguments: tuple[Any, ...], sender: Any) -> None:
    try:
        module, _, name = function.partition(":")
        sender.send((getattr(importlib.import_module(module), name)(*arguments), None))
    except KeyboardInterrupt:
        # The user stopped the parent, too, and it is the parent that says so.
        pass
    except Exception as error:
        traceback.print_exc()
        told = f"{function} failed: {type(error).__name__}: {error}"
        sender.send((None, told[:800]))
