"""The command line: `python -m cacovid_kernels demo`, `... train` and `... doctor`."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from cacovid_kernels.errors import UserError


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}. See {self.prog} --help.")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments without the program's name; those of the process when absent.

    Returns:
        0: done. 1: the library gave a wrong answer or cannot be used. 2: the call cannot be served, one line
        on stderr says why. 130: interrupted.
    """
    try:
        arguments = _parser().parse_args(argv)
        return arguments.command(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m cacovid_kernels", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="{demo,train,doctor}")

    demo = commands.add_parser("demo", help="compress a real video for a real model and prove it right")
    demo.set_defaults(command=_demo)
    demo.add_argument("--video", type=Path, metavar="FILE", help="video file; without it, a clip is rendered")
    demo.add_argument("--question", metavar="TEXT", help="default: one about the clip")
    demo.add_argument("--keep-ratio", type=float, default=0.1, help="share of video tokens kept, in (0, 1]")
    demo.add_argument("--out", type=Path, default=Path("demo_out"), metavar="DIR", help="results")
    demo.add_argument(
        "--model", help="folder or hub name, any family; default: that of the rendered world, random for a video"
    )
    demo.add_argument("--policy", type=Path, metavar="DIR", help="trained policy; default: the world's, else random")
    demo.add_argument(
        "--budget", choices=("frames", "video"), help="tokens per frame as published, or the best of the whole video"
    )
    demo.add_argument("--frames", type=int, default=32, metavar="N", help="frames sampled from the video, at most")
    demo.add_argument("--max-new-tokens", type=int, default=16, metavar="N", help="tokens to generate")
    demo.add_argument("--repeats", type=int, default=3, metavar="N", help="runs, of which the best time counts")
    demo.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    demo.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    demo.add_argument("--seed", type=int, default=0, metavar="N", help="of the clip, and of what is random")

    train = commands.add_parser("train", help="train a compression policy against a frozen model")
    train.set_defaults(command=_train)
    train.add_argument("--config", type=Path, required=True, metavar="FILE", help="JSON or TOML, see TrainConfig")

    doctor = commands.add_parser("doctor", help="what was built, which backends work, a self-test of each")
    doctor.set_defaults(command=_doctor)
    return parser


def _demo(arguments: argparse.Namespace) -> int:
    if not (math.isfinite(arguments.keep_ratio) and 0 < arguments.keep_ratio <= 1):
        raise UserError(f"--keep-ratio={arguments.keep_ratio} must be in (0, 1].")
    if arguments.question is not None and not arguments.question.strip():
        raise UserError("--question must not be empty.")
    for name, least in (("frames", 1), ("max_new_tokens", 1), ("repeats", 1), ("seed", 0)):
        if getattr(arguments, name) < least:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag}={getattr(arguments, name)} must be at least {least}.")
    with _extra("demo"):
        from cacovid_kernels.demo.report import Progress

        with Progress().stage("load torch and transformers"):
            from cacovid_kernels.demo.command import run_demo
    return run_demo(arguments)


def _train(arguments: argparse.Namespace) -> int:
    with _extra("train"):
        from cacovid_kernels.training.command import run_train
    return run_train(arguments.config)


def _doctor(arguments: argparse.Namespace) -> int:
    from cacovid_kernels.doctor import examine

    return examine()


@contextmanager
def _extra(name: str) -> Iterator[None]:
    """Imports of a command whose packages an extra of the same name installs."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("cacovid_kernels"):
            raise
        raise UserError(
            f"{name}: a package is missing ({error}). Install with `pip install cacovid-kernels[{name}]`."
        ) from None
