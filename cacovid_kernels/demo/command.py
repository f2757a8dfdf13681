"""`python -m cacovid_kernels demo`: run, show, write."""

from __future__ import annotations

import argparse

from rich.console import Console
from rich.text import Text
from transformers.utils import logging

from cacovid_kernels.demo.files import staged, write_json, write_page, write_picture
from cacovid_kernels.demo.pipeline import Options, run
from cacovid_kernels.demo.report import Progress, notes, table


def run_demo(arguments: argparse.Namespace) -> int:
    """Run the demo for parsed arguments; 0 when the compressed run is right, else 1."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    console, progress = Console(), Progress()
    options = Options(
        video=arguments.video,
        question=arguments.question,
        keep_ratio=arguments.keep_ratio,
        budget=arguments.budget,
        num_frames=arguments.frames,
        max_new_tokens=arguments.max_new_tokens,
        repeats=arguments.repeats,
        model=arguments.model,
        policy=arguments.policy,
        device=arguments.device,
        dtype=arguments.dtype,
        seed=arguments.seed,
    )
    with staged(arguments.out) as folder:
        result = run(options, folder, progress)
        with progress.stage("write the picture"):
            write_picture(result, folder / "kept_tokens.png")
            write_page(result, folder / "report.html")
            write_json(result, folder / "selection.json")
        names = sorted(file.name for file in folder.iterdir())
    console.print(table(result))
    for line in [*notes(result), f"wrote {', '.join(names)} to {arguments.out}"]:
        console.print(Text(line), soft_wrap=True)
    return 0 if result.agreement.holds else 1
