"""What a run says: a progress bar, TensorBoard scalars, and one JSON line per step."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

LOG = "log.jsonl"
_SECONDS_PER_LINE = 30.0  # off a terminal


class Log:
    """The record of a run, continued where a checkpoint left it.

    Args:
        output: folder of the run.
        start: step from which the run goes on; records of later steps, of a run that was stopped, are removed.
        total: steps of the run.
    """

    def __init__(self, output: Path, start: int, total: int) -> None:
        output.mkdir(parents=True, exist_ok=True)
        self.path = output / LOG
        _keep_until(self.path, start)
        self.total = total
        self.console = Console(stderr=True)
        self._file = self.path.open("a")
        self._writer = SummaryWriter(str(output / "tensorboard"), purge_step=start + 1)
        self._bar = Progress(
            TextColumn("train"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
            TextColumn("{task.fields[news]}"), console=self.console, disable=not self.console.is_terminal,
        )  # fmt: skip
        self._task = self._bar.add_task("train", total=total, completed=start, news="")
        self._said = time.monotonic()

    def __enter__(self) -> Log:
        self._bar.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.stop()
        self._file.close()
        self._writer.close()

    def step(self, step: int, scalars: dict[str, float]) -> None:
        """Record a step that is done."""
        self._file.write(json.dumps({"step": step, **scalars}) + "\n")
        self._file.flush()
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)
        news = f"reward {scalars['reward']:.3f} accuracy {scalars['accuracy']:.3f} kept {scalars['kept_ratio']:.3f}"
        self._bar.update(self._task, completed=step, news=news)
        if self._bar.disable and time.monotonic() - self._said > _SECONDS_PER_LINE:
            self.say(f"step {step}/{self.total}: {news}")

    def say(self, line: str) -> None:
        """Print one line."""
        self.console.print(line, highlight=False, soft_wrap=True)
        self._said = time.monotonic()


def read_log(output: str | Path) -> list[dict[str, float]]:
    """The records of a run, one per step, in order; a line that was being written when it stopped is left out."""
    path = Path(output) / LOG
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


def _keep_until(path: Path, step: int) -> None:
    kept = [record for record in read_log(path.parent) if record["step"] <= step]
    staged = path.with_suffix(".tmp")
    with staged.open("w") as file:
        file.writelines(json.dumps(record) + "\n" for record in kept)
        file.flush()
        os.fsync(file.fileno())
    os.replace(staged, path)
