"""How a command ends: mistakes of the user give one line and exit code 2, without a traceback."""

import os
import sys
import traceback
from collections.abc import Callable

DEBUG = "DIFFADAPT_DEBUG"  # environment variable: show the traceback as well


def run(main: Callable[[], int]) -> int:
    """Runs a command. Returns its exit code."""
    try:
        return main()
    except (ValueError, TypeError, OSError, FloatingPointError) as error:
        if os.environ.get(DEBUG):
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
