"""Stopping politely: SIGTERM and Ctrl-C end a run after the current step, with a checkpoint."""

import signal
from types import FrameType

import torch
from accelerate import Accelerator


class StopRequest:
    """Context in which SIGTERM and SIGINT are noted and do not end the process; a second Ctrl-C does."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def agreed(self, accelerator: Accelerator) -> int | None:
        """The signal some process received, the same answer on every process; None to go on."""
        number = self.received or 0
        if accelerator.num_processes > 1:
            flags = accelerator.gather(torch.tensor([number], device=accelerator.device))
            number = int(flags.max())
        return number or None

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
