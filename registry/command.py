"""What the commands share: how each of them ends, and how an assignment on a command line reads."""

from __future__ import annotations

import functools
import io
import os
import sys
from collections.abc import Callable, Sequence

from registry.errors import UsageError

INTERRUPTED = 130
"""The exit status of a command that was interrupted, as a shell gives it."""

LESS_MEMORY = (
    "Less of it: a smaller slots, microbatch_tokens or max_new_tokens, dtype=bfloat16, lora_rank=16, "
    "gradient_checkpointing=true, or no other process on the GPU"
)

Main = Callable[..., int | None]


def command(*, interrupted: str = "", errors: tuple[type[Exception], ...] = ()) -> Callable[[Main], Callable[..., int]]:
    """Decorator of a command's ``main``, which then returns an exit status instead of raising: ``main``'s own (0 for
    None), 2 for bad input, 130 when interrupted, 1 when the reader of standard output has gone.

    Args:
        interrupted: what an interrupted user should know, such as how to go on.
        errors: what is bad input besides ``UsageError``, such as ``OSError`` of a file that the user names.
    """

    bad_input: tuple[type[Exception], ...] = (UsageError, *errors)

    def decorate(main: Main) -> Callable[..., int]:
        @functools.wraps(main)
        def run(arguments: Sequence[str] | None = None) -> int:
            if getattr(sys.stdout, "errors", None) == "strict" and isinstance(sys.stdout, io.TextIOWrapper):
                sys.stdout.reconfigure(errors="replace")  # a console that lacks a character of a problem shows a "?"
            try:
                status = main(arguments) or 0
                sys.stdout.flush()  # so that a reader who has gone is noticed here
                return status
            except BrokenPipeError:  # the reader has seen enough; what is buffered goes nowhere
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                return 1
            except bad_input as error:
                print(f"error: {error}", file=sys.stderr)
                return 2
            except RuntimeError as error:
                if (
                    type(error).__name__ != "OutOfMemoryError"
                ):  # torch's, of a GPU; no import of it for a command's help
                    raise
                print(f"error: {first_line(error)} {LESS_MEMORY}", file=sys.stderr)
                return 2
            except KeyboardInterrupt:
                print(f"interrupted: {interrupted}" if interrupted else "interrupted", file=sys.stderr)
                return INTERRUPTED

        return run

    return decorate


def first_line(error: Exception) -> str:
    """Of what an error says, as one sentence."""
    return str(error).strip().split("\n")[0].split(". ")[0].rstrip(".") + "."


def assignment(text: str, option: str = "--set") -> tuple[str, str]:
    """Name and value of ``name=value``; raises ``UsageError``, which names ``option``, where ``text`` is none."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise UsageError(f"{option} {text!r} is no assignment: write name=value")
    return name, value
