"""Where the time of training steps goes: a trace of torch's profiler, and a table of the ten costliest operations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

WARM = 5  # steps before it begins: compiling is over by then, also of what happens every few steps only
ROWS = 10


class Profile:
    """Records some steps of a run, those after ``WARM`` of them; ``step`` is called after every step."""

    def __init__(self, folder: Path, steps: int, device: torch.device, log: Callable[[str], None]) -> None:
        """``profile/`` is made in the folder; ``log`` gets the table. No steps: nothing is recorded."""
        self.folder, self.steps, self.device, self.log = folder / "profile", steps, device, log
        self.done, self.profiler = 0, None

    def step(self) -> None:
        self.done += 1
        if self.steps and self.done == WARM:
            kinds = [torch.profiler.ProfilerActivity.CPU]
            if self.device.type == "cuda":
                kinds.append(torch.profiler.ProfilerActivity.CUDA)
            self.profiler = torch.profiler.profile(activities=kinds)
            self.profiler.start()
        elif self.profiler and self.done == WARM + self.steps:
            self.close()

    def close(self) -> None:
        """Writes what was recorded, if anything was; the end of a run calls it too."""
        profiler, self.profiler = self.profiler, None
        if profiler is None:
            if self.steps and self.done < WARM:
                self.log(f"note: --profile begins after {WARM} steps, and there were only {self.done}: nothing is "
                         "recorded")
            return
        profiler.stop()
        self.folder.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(self.folder / "trace.json.gz"))
        recorded, on_gpu = min(self.steps, self.done - WARM), self.device.type == "cuda"
        steps, where = max(1, recorded), "the GPU" if on_gpu else "the CPU"
        # A range that code names ("Optimizer.step") has a time of its own on the GPU as well, of all kernels in it.
        times = {event.key: (event.self_device_time_total if on_gpu else event.self_cpu_time_total, event.count)
                 for event in profiler.key_averages() if not (on_gpu and getattr(event, "is_user_annotation", False))}
        whole = max(1e-9, sum(time for time, _ in times.values()))
        lines = [f"{'ms/step':>10}{'share':>8}{'calls/step':>12}  operation (own time on {where}, {steps} steps)\n"]
        lines += [f"{time / 1000 / steps:>10.2f}{time / whole:>8.1%}{count / steps:>12.1f}  {name}\n"
                  for name, (time, count) in sorted(times.items(), key=lambda item: -item[1][0])[:ROWS]]
        (self.folder / "top10.txt").write_text("".join(lines))
        self.log(f"{''.join(lines)}trace of {recorded} steps: {self.folder / 'trace.json.gz'} (opens in "
                 "chrome://tracing or ui.perfetto.dev)")
