"""Ctrl-C and SIGTERM as requests to stop."""

import os
import signal
import subprocess
import sys

import pytest

from gptk.system.interrupts import Interrupts


@pytest.mark.parametrize("at_once", [False, True])
def test_a_second_signal_while_handlers_are_restored_is_no_second_interrupt(monkeypatch, at_once):
    """It came while the program, which had caught the first one, was about to say so."""
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    restore = signal.signal

    def signal_and_restore(number, handler):
        if number == signal.SIGINT:
            os.kill(os.getpid(), signal.SIGTERM)
        return restore(number, handler)

    with Interrupts(at_once=at_once) as interrupts:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except KeyboardInterrupt:
            assert at_once
        monkeypatch.setattr(signal, "signal", signal_and_restore)
    assert interrupts.number == signal.SIGTERM
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_an_interrupt_has_the_exit_code_of_its_signal():
    with Interrupts(at_once=True), pytest.raises(KeyboardInterrupt) as error:
        os.kill(os.getpid(), signal.SIGTERM)
    assert error.value.exit_code == 143


def test_an_interrupt_that_a_library_makes_another_error_ends_the_program_as_one():
    """As pydantic does while it builds a class: such an error is no fault in gptk."""
    program = """if True:
        import os, signal
        signal.signal(signal.SIGINT, signal.default_int_handler)  # it may be ignored
        from gptk import cli

        def interrupted(*arguments, **settings):
            try:
                os.kill(os.getpid(), signal.SIGINT)
            except KeyboardInterrupt:
                raise RuntimeError("the class cannot be built") from None

        cli.cli.main = interrupted
        cli.main()
    """
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False)
    assert (out.returncode, out.stderr) == (130, b"")
