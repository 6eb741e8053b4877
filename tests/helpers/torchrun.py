"""Two real processes on a CPU, for tests."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def torchrun(script: Path, *arguments: object, **settings: object) -> subprocess.Popen:
    """Starts a script as two processes, which meet over gloo; `settings` go to `subprocess.Popen`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}"]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    command = [*launcher, str(script), *map(str, arguments)]
    return subprocess.Popen(
        command, env=environment, stderr=subprocess.PIPE, text=True, encoding="utf-8", **settings
    )


def run_torchrun(script: Path, *arguments: object) -> None:
    """Runs a script as two processes to its end, which must be a good one."""
    process = torchrun(script, *arguments, stdout=subprocess.DEVNULL)
    _, said = process.communicate()
    assert process.returncode == 0, said[-3000:]
