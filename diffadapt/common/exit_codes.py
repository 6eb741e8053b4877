"""Exit codes of commands: a mistake of the user ends in one line and exit code 2, without a traceback."""

import io
import os
import sys
import traceback
from collections.abc import Callable

from diffadapt.common.launcher import end_with_launcher

DEBUG = "DIFFADAPT_DEBUG"  # environment variable: print the traceback as well


def run_command(main: Callable[[], int]) -> int:
    """Runs a command and turns errors into messages and exit codes.

    Args:
        main: the command; returns its exit code.

    Returns:
        The exit code: that of `main`, 2 for an error of the user, 130 for Ctrl-C.
    """
    end_with_launcher()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A character that the terminal cannot show must not end the command.
            stream.reconfigure(errors="backslashreplace")
    try:
        return main()
    # the errors that the package raises for bad input; others are faults, whose traceback is needed
    except (ValueError, TypeError, OSError, FloatingPointError) as error:
        if os.environ.get(DEBUG):
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        print(" ".join(["stopped", *map(str, interrupt.args)]), file=sys.stderr)
        return 130  # 128 + SIGINT, as shells report it
