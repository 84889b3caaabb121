"""SIGINT, SIGTERM and SIGHUP as a question that the training loop asks."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

STOPPING = tuple(getattr(signal, n) for n in ("SIGTERM", "SIGHUP") if hasattr(signal, n))
"""A request to stop: `kill`, and a terminal that is closed."""


def obeyed() -> tuple[signal.Signals, ...]:
    """Those of `STOPPING` that whoever started this process did not switch off, as `nohup` does."""
    return tuple(number for number in STOPPING if signal.getsignal(number) != signal.SIG_IGN)


@contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """An event that these signals set; a second SIGINT raises KeyboardInterrupt."""
    asked = threading.Event()

    def ask(number: int, _: object) -> None:
        if asked.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.set()

    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, *obeyed())}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
