"""How work on a device is timed: in turns on a CPU, with events and an empty L2 on a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from measure import spread


class Clock:
    """Times work on a device."""

    def __init__(self, device: torch.device, repeats: int, seconds: float) -> None:
        self.device, self.repeats, self.seconds = device, repeats, seconds
        self.cuda = device.type == "cuda"
        self.flushed = torch.empty(1 << 30 if self.cuda else 1, dtype=torch.int8, device=device)

    def mark(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def ms(self, start: Any, end: Any) -> float:
        if not self.cuda:
            return (end - start) * 1e3
        end.synchronize()
        return start.elapsed_time(end)

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def turns(self, works: dict[str, Callable[[int], object]]) -> dict[str, list[float]]:
        """ms of each work's runs, taken in turns; a work is given the number of its run.

        `repeats` runs, or as many as `seconds` allow: three at least where five times that allows
        them.
        """
        found: dict[str, list[float]] = {name: [] for name in works}
        for i in range(self.repeats):
            for name, work in works.items():
                if sum(found[name]) < self.seconds * (5e3 if i < 3 else 1e3):
                    self.flushed.zero_()
                    start = self.mark()
                    work(i)
                    found[name].append(self.ms(start, self.mark()))
        return found

    def runs(self, work: Callable[[], list[Any]]) -> list[list[Any]]:
        """The marks of as many runs as `seconds` allow, `repeats` at most and three at least."""
        warm = self.once(work)
        if not self.cuda:
            return [warm]
        torch.cuda.reset_peak_memory_stats()
        marks = self.once(work)
        ms = max(self.ms(marks[0], marks[-1]), 1e-3)
        n_runs = min(self.repeats, max(3, int(self.seconds * 1e3 / ms)))
        found = [self.once(work) for _ in range(n_runs)]
        self.synchronize()
        return found

    def once(self, work: Callable[[], list[Any]]) -> list[Any]:
        self.flushed.zero_()
        return [self.mark(), *work(), self.mark()]

    def time(self, work: Callable[[], object]) -> dict[str, Any]:
        def unmarked() -> list[Any]:
            work()
            return []

        return self.figures([(run[0], run[1]) for run in self.runs(unmarked)])

    def figures(self, spans: list[tuple[Any, Any]]) -> dict[str, Any]:
        peak = torch.cuda.max_memory_allocated() - self.flushed.numel() if self.cuda else None
        return {**spread([self.ms(*span) for span in spans]), "peak_bytes": peak}
