"""The first Ctrl-C is an event, the next one an interrupt, and afterwards all is as before."""

from __future__ import annotations

import signal
import threading

import pytest

from adalink.tools.terminal.interrupts import Interrupts


def test_first_calls_and_second_interrupts() -> None:
    calls, before = list[str](), signal.getsignal(signal.SIGINT)
    with Interrupts() as interrupts:
        interrupts.call(lambda: calls.append("called"))
        signal.raise_signal(signal.SIGINT)
        assert calls == ["called"]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert calls == ["called"]
    assert signal.getsignal(signal.SIGINT) is before


def test_one_that_came_early_is_not_lost() -> None:
    calls = list[str]()
    with Interrupts() as interrupts:
        signal.raise_signal(signal.SIGINT)
        interrupts.call(lambda: calls.append("called"))
    assert calls == ["called"]


def test_errors_give_the_handler_back() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(ZeroDivisionError), Interrupts():
        raise ZeroDivisionError
    assert signal.getsignal(signal.SIGINT) is before


def test_other_threads_leave_the_handler_alone() -> None:
    seen, before = list[object](), signal.getsignal(signal.SIGINT)

    def run() -> None:
        with Interrupts():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [before]
