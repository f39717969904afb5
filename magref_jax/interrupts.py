"""Ctrl-C while a program loads its libraries, which takes seconds: it ends without a word in place of a traceback.

Imports nothing that takes time, so that a program can begin with it.
"""

import os
import signal
from typing import Any

INTERRUPTED = 130  # exit status


def _leave(*_: Any) -> None:
    os._exit(INTERRUPTED)


def end_silently() -> None:
    """Lets Ctrl-C end the process at once, unless something else was to become of it."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)


def raise_as_usual() -> None:
    """Takes `end_silently` back: Ctrl-C raises KeyboardInterrupt."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)
