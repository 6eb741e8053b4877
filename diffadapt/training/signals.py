"""Signals end a run after the current step, with a checkpoint, and not in the middle of it."""

import os
import select
import signal
from types import FrameType

import torch
from accelerate import Accelerator

SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP")  # SIGHUP: the terminal was closed; Windows has none
STANDARD_OUTPUT = 1
STANDARD_ERROR = 2
STOPS_AFTER_STEP = "stops after this step and saves a checkpoint"
STOPPED_AT_ONCE = "without saving; the last checkpoint, if there is one, is as it was"


class StopRequest:
    """Context in which SIGTERM, SIGINT and SIGHUP are noted and do not end the process; a second Ctrl-C does.

    A signal that is ignored stays ignored, as SIGHUP under `nohup`.

    Args:
        announce: whether this process says at once what a signal will do (the main process).

    Attributes:
        received: the first signal that came, None before.
    """

    def __init__(self, *, announce: bool = True) -> None:
        self.received: int | None = None
        self._announce = announce
        self._interrupted = False
        self._previous_handlers: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        for name in SIGNALS:
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) != signal.SIG_IGN:
                self._previous_handlers[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)

    def agreed(self, accelerator: Accelerator) -> int | None:
        """The signal some process received, the same answer on every process; None to go on."""
        number = self.received or 0
        if accelerator.num_processes > 1:
            numbers = accelerator.gather(torch.tensor([number], device=accelerator.device))
            number = int(numbers.max())  # 0 where no process received one
        if number:
            replace_lost_outputs()
        return number or None

    def _note(self, number: int, frame: FrameType | None) -> None:
        """The handler of all three signals."""
        if number == signal.SIGINT and self._interrupted:
            raise KeyboardInterrupt(STOPPED_AT_ONCE)
        is_first = self.received is None
        if is_first:
            self.received = number
        if number == signal.SIGINT:
            self._interrupted = True
            self._say(f"Ctrl-C: {STOPS_AFTER_STEP}; Ctrl-C again stops at once, without saving")
        elif is_first:
            self._say(f"{signal.Signals(number).name}: {STOPS_AFTER_STEP}")

    def _say(self, text: str) -> None:
        """Writes past Python's buffers, which the signal may have interrupted."""
        if not self._announce:
            return
        try:
            os.write(STANDARD_ERROR, f"\n{text}\n".encode())
        except OSError:  # nobody reads any more
            replace_lost_outputs()


def replace_lost_outputs() -> None:
    """Sends outputs without a reader (a closed terminal, `| tee log`) to nowhere: writing would raise."""
    if not hasattr(select, "poll"):  # Windows
        return
    for output in (STANDARD_OUTPUT, STANDARD_ERROR):
        poll = select.poll()
        poll.register(output, 0)
        if any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0)):
            # by the descriptor, so that libraries which write past Python's sys.stdout are covered too
            null_device = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null_device, output)
            os.close(null_device)
