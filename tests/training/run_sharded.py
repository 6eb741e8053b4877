"""Two runs of a script in this process group, for the test of a sharded base: with and without --shard_base.

torchrun --nproc_per_node 2 run_sharded.py SCRIPT OUTPUT OPTION...
"""

import runpy
import sys
from pathlib import Path

from accelerate.state import AcceleratorState, PartialState


def main(script: str, output: str, *options: str) -> None:
    for name, extra in (("whole", ()), ("sharded", ("--shard_base",))):
        AcceleratorState._reset_state(reset_partial_state=False)
        sys.argv = [script, *options, "--output_dir", str(Path(output) / name), *extra]
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as end:
            if end.code:
                raise
    PartialState().destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
