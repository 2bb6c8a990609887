"""How a command ends, and what an assignment is."""

from __future__ import annotations

import io
import subprocess
import sys

import pytest
import torch

from registry import UsageError
from registry.command import INTERRUPTED, assignment, command


def end(error: BaseException | None, status: int | None = None, **given) -> int:
    @command(**given)
    def main(arguments=None):
        """Says."""
        if error is not None:
            raise error
        return status

    assert main.__doc__ == "Says."
    return main([])


def test_the_status_is_the_commands_own() -> None:
    assert (end(None), end(None, 1)) == (0, 1)


def test_bad_input_is_told_without_a_traceback(capsys) -> None:
    assert end(UsageError("no such thing: give another")) == 2
    assert capsys.readouterr().err == "error: no such thing: give another\n"
    assert end(OSError("no such file"), errors=(OSError,)) == 2
    with pytest.raises(OSError, match="no such file"):
        end(OSError("no such file"))


def test_a_full_gpu_is_told_in_one_line_with_remedies(capsys) -> None:
    said = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.18 GiB of which ...\nmore"
    assert end(torch.OutOfMemoryError(said)) == 2
    line, nothing = capsys.readouterr().err.split("\n")
    assert line.startswith("error: CUDA out of memory. Less of it: ") and "microbatch_tokens" in line and not nothing
    with pytest.raises(RuntimeError, match="another"):
        end(RuntimeError("another"))


def test_an_interruption_says_how_to_go_on(capsys) -> None:
    assert end(KeyboardInterrupt(), interrupted="the same command goes on") == INTERRUPTED
    assert end(KeyboardInterrupt()) == INTERRUPTED
    assert capsys.readouterr().err == "interrupted: the same command goes on\ninterrupted\n"


@pytest.mark.parametrize("flush", [True, False])
def test_a_reader_may_leave(flush: bool) -> None:
    """As ``head`` does, whether what it did not read was flushed or still buffered."""
    program = f"""
import sys, time
from registry.command import command

@command(errors=(OSError,))
def main(arguments=None):
    sys.stdin.read()
    print("more", flush={flush})

sys.exit(main())
"""
    child = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert child.stdin and child.stdout and child.stderr
    child.stdout.close()
    child.stdin.close()
    assert (child.wait(60), child.stderr.read()) == (1, b"")
    child.stderr.close()


@pytest.mark.parametrize("text", ["name", "=value", ""])
def test_what_is_no_assignment_names_its_option(text: str) -> None:
    with pytest.raises(UsageError, match=f"--env-set '{text}' is no assignment"):
        assignment(text, "--env-set")


def test_a_value_may_hold_the_sign() -> None:
    assert assignment("a.b=c=d") == ("a.b", "c=d")
    assert assignment("a=") == ("a", "")


def test_a_console_that_lacks_a_character_shows_a_question_mark(monkeypatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="cp1252"))

    @command()
    def main(arguments=None):
        print("Wenn \u82e5 = \u00e9")

    assert main([]) == 0
    assert written.getvalue() == "Wenn ? = \u00e9\n".encode("cp1252")
