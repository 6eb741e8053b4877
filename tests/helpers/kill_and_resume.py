"""Kills a training run with SIGKILL at random moments, resumes it each time, and compares the final bits.

    python tests/helpers/kill_and_resume.py --kills 20

The run saves after every step, so that many of the kills fall into the writing of a checkpoint. It uses a
moving average, accumulation, dropout, random crops and Prodigy, whose state is the largest. Linux.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
SPOKEN = Path(tempfile.gettempdir()) / f"kill_and_resume-{os.getpid()}.txt"  # what the last child printed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    arguments = parser.parse_args()
    steps = max(30, 3 * arguments.kills + 2)  # so that the last kill comes before the end
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "train_scripts")]
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        command = prepare(Path(place), steps)
        started = time.monotonic()
        if wait(start([*command, "--output_dir", f"{place}/whole"])) != 0:
            raise RuntimeError(
                f"the run that nobody kills failed: {SPOKEN.read_text(encoding='utf-8')[-2000:]}"
            )
        step_time = (time.monotonic() - started) / steps
        killed = Path(place) / "killed"
        killed_at = kill_and_resume(command, killed, arguments.kills, step_time, arguments.seed)
        check(Path(place) / "whole", killed)
    print(f"{len(killed_at)} kills, at steps {killed_at}: the same bits as the run that nobody killed")
    return 0 if len(killed_at) == arguments.kills else 1


def prepare(place: Path, steps: int) -> list[str]:
    """A tiny base and pictures; the arguments of the run but its output."""
    from helpers.pipelines import tiny_sd_pipeline, write_pictures

    tiny_sd_pipeline(place / "base", vae="kl")
    write_pictures(place / "pictures", 3, size=(48, 40))
    options = {
        "pretrained_model_name_or_path": place / "base",
        "instance_data_dir": place / "pictures",
        "instance_prompt": "a sks dog",
        "adapter": "lora(rank=2, dropout=0.2)",
        "max_train_steps": steps,
        "checkpointing_steps": 1,
        "checkpoints_total_limit": 2,
        "gradient_accumulation_steps": 2,
        "train_batch_size": 1,
        "optimizer": "prodigy",
        "ema_decay": 0.9,
        "num_validation_images": 0,
        "export_formats": "none",
        "num_threads": 1,
    }
    return ["--use_ema", *[part for name, value in options.items() for part in (f"--{name}", str(value))]]


def start(arguments: Sequence[str]) -> int:
    """Runs dreambooth.py in a child process, which inherits what is imported. Returns its id."""
    import dreambooth

    child = os.fork()
    if child == 0:
        code = 70
        try:
            sys.argv = ["dreambooth.py", *arguments]
            with open(SPOKEN, "w", encoding="utf-8") as spoken:
                os.dup2(spoken.fileno(), sys.stdout.fileno())
                os.dup2(spoken.fileno(), sys.stderr.fileno())
                code = dreambooth.run_command(dreambooth.main)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return child


def wait(child: int) -> int:
    """The exit code of a child: negative when a signal ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_and_resume(
    command: Sequence[str], output: Path, kills: int, step_time: float, seed: int
) -> list[int]:
    """Starts, kills and resumes until the run was killed often enough and has ended.

    Returns: the steps that were logged when it was killed.
    """
    moments, killed_at = random.Random(seed), []
    while True:
        resume = ["--resume_from_checkpoint", "latest"] if list(output.glob("checkpoint-*")) else []
        child = start([*command, "--output_dir", str(output), *resume])
        killer = threading.Thread(target=kill, args=(child, output, moments.uniform(0, 2 * step_time)))
        if len(killed_at) < kills:
            killer.start()
        code = wait(child)
        if killer.ident is not None:
            killer.join()
        if code == 0:
            return killed_at
        if code != -signal.SIGKILL:
            said = SPOKEN.read_text(encoding="utf-8")[-2000:]
            raise RuntimeError(f"after {len(killed_at)} kills a run ended with code {code}: {said}")
        killed_at.append(steps_logged(output))


def kill(child: int, output: Path, delay: float) -> None:
    """SIGKILL `delay` seconds after the log changed: the loading of models is not what is tested."""
    before = steps_logged(output)
    with contextlib.suppress(ProcessLookupError):  # it has ended
        handle = os.pidfd_open(child)
        while steps_logged(output) == before and Path(f"/proc/{child}").exists():
            time.sleep(0.002)
        time.sleep(delay)
        signal.pidfd_send_signal(handle, signal.SIGKILL)


def steps_logged(output: Path) -> int:
    """Whole lines of the log."""
    log = output / "log.jsonl"
    return log.read_text(encoding="utf-8").count("\n") if log.exists() else 0


def check(whole: Path, killed: Path) -> None:
    """Raises: AssertionError when the two runs differ in a bit of the adapter or in what they logged."""
    one, two = (load_file(folder / "adapter.safetensors") for folder in (whole, killed))
    assert one.keys() == two.keys()
    assert all(torch.equal(value, two[name]) for name, value in one.items()), "the final bits differ"
    logs = [
        [json.loads(line) for line in (f / "log.jsonl").read_text(encoding="utf-8").splitlines()]
        for f in (whole, killed)
    ]
    figures = [[(line["step"], line["loss"], line["lr"]) for line in log] for log in logs]
    assert figures[0] == figures[1], "the logs differ"


if __name__ == "__main__":
    sys.exit(main())
