"""How a user's mistake is reported: one line, no traceback, a non-zero exit."""

import sys
from collections.abc import Callable
from typing import Any


class NucleiError(Exception):
    """A mistake that the user can mend.

    The message is one line: it names the file or the key, and says what to do.
    """


def run_tool(main: Callable[[], Any]) -> None:
    """Run a command-line tool's ``main``; every ``tools/`` and ``datasets/`` script ends in this.

    Exit status: 0, or ``main``'s own ``SystemExit``; 2 with one line on stderr for a
    :class:`NucleiError`; 130 when interrupted. What a terminal cannot show is escaped.
    """
    for stream in (sys.stdout, sys.stderr):  # names of files need not be UTF-8
        stream.reconfigure(errors="backslashreplace")
    try:
        main()
    except NucleiError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
