"""How a command ends: mistakes of the user give one line and exit code 2, without a traceback."""

import io
import os
import sys
import traceback
from collections.abc import Callable

from diffadapt.common.launcher import end_with_launcher

DEBUG = "DIFFADAPT_DEBUG"  # environment variable: show the traceback as well


def run_command(main: Callable[[], int]) -> int:
    """Runs a command, and ends with the launcher of the process. Returns its exit code."""
    end_with_launcher()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # what the terminal's encoding lacks is no fault
    try:
        return main()
    except (ValueError, TypeError, OSError, FloatingPointError) as error:
        if os.environ.get(DEBUG):
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        print(" ".join(["stopped", *map(str, interrupt.args)]), file=sys.stderr)
        return 130
