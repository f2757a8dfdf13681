"""Training runs in processes of their own: to be killed, or to work together."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from typing import Any

from training_toy import BRIGHT, ToyRows, toy_model

from cacovid_kernels.training.config import TrainConfig
from cacovid_kernels.training.log import read_log
from cacovid_kernels.training.rewards import Attempts, Reward

ROWS = 16


def _default() -> None:
    """What the trainer makes for itself."""


def start(
    config: TrainConfig, processes: int = 1, accelerator: Callable[[], Any] = _default, until: int | None = None
) -> list[BaseProcess]:
    """Start a run on the toy data in so many processes, which one server forks: they start in no time.

    After step `until` it stands still, however late the test is to kill it.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["training_process", "training_preload"])
    with _path_of_tests():
        forkserver.ensure_running()
    port = _free_port()
    started = []
    for rank in range(processes):
        process = context.Process(target=_run, args=(config, rank, processes, port, accelerator, until))
        process.start()
        started.append(process)
    return started


def finish(processes: list[BaseProcess]) -> None:
    """Wait for a run that must succeed."""
    for process in processes:
        process.join(300)
    codes = [process.exitcode for process in processes]
    assert codes == [0] * len(processes), codes


def _run(
    config: TrainConfig, rank: int, processes: int, port: int, accelerator: Callable[[], Any], until: int | None
) -> None:
    os.environ["ACCELERATE_USE_CPU"] = "true"
    if processes > 1:
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
    from training_preload import Trainer

    reward = BRIGHT if until is None else _bright_until(until, config.output)
    Trainer(config, toy_model(), ToyRows(ROWS), reward=reward, accelerator=accelerator()).train()


def _bright_until(step: int, output: str) -> Reward:
    def bright(attempts: Attempts) -> Any:
        while len(read_log(output)) >= step:
            time.sleep(0.01)
        return BRIGHT.function(attempts)

    return Reward(bright, bright)


@contextmanager
def _path_of_tests() -> Iterator[None]:
    """The server, once started, imports from where this process does; it reads that from the environment alone."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
