"""The command line: exit codes, one-line errors, nothing half-written, and the doctor."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import cacovid_kernels as ck
from cacovid_kernels import _order, cuda, doctor, triton
from cacovid_kernels.cli import main


def refuse(capsys, *argv):
    """The one line on stderr of a call that must end with exit code 2."""
    assert main(argv) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("error: ")
    assert output.err.count("\n") == 1
    return output.err


@pytest.mark.parametrize("ratio", ["0", "-0.1", "1.5", "nan", "inf", "many"])
def test_ratio_outside_its_range(capsys, ratio):
    assert "--keep-ratio" in refuse(capsys, "demo", f"--keep-ratio={ratio}")


@pytest.mark.parametrize("question", ["", "  \n"])
def test_empty_question(capsys, question):
    assert "--question must not be empty" in refuse(capsys, "demo", "--question", question)


@pytest.mark.parametrize(
    "argv, message",
    [
        ((), "required"),
        (("fly",), "invalid choice"),
        (("demo", "--fast"), "unrecognized"),
        (("demo", "--frames", "0"), "--frames=0"),
        (("demo", "--max-new-tokens", "0"), "--max-new-tokens=0"),
    ],
)
def test_unknown_arguments(capsys, argv, message):
    assert message in refuse(capsys, *argv)


def test_help_is_not_an_error(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["demo", "--help"])
    assert stop.value.code == 0
    assert "--keep-ratio" in capsys.readouterr().out


def test_process_reports_a_bad_video_and_leaves_nothing(tmp_path):
    pytest.importorskip("av")
    (tmp_path / "text.mp4").write_text("no video")
    command = [sys.executable, "-m", "cacovid_kernels", "demo", "--video", "text.mp4", "--out", "out"]
    ended = subprocess.run(command, cwd=tmp_path, env=_environment(), capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.count("\n") == 1
    assert "text.mp4 is not a video" in ended.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["text.mp4"]


def test_interruption_leaves_nothing(tmp_path, monkeypatch, capsys):
    command = pytest.importorskip("cacovid_kernels.demo.command")

    def interrupted(options, folder, progress):
        (folder / "clip.mp4").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "run", interrupted)
    assert main(["demo", "--out", str(tmp_path / "out")]) == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_ctrl_c_ends_the_process_and_leaves_nothing(tmp_path):
    pytest.importorskip("cacovid_kernels.demo.command")
    process = subprocess.Popen(
        [sys.executable, "-m", "cacovid_kernels", "demo", "--out", "out"],
        cwd=tmp_path,
        env=_environment(),
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".cacovid-*/clip.*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[1] == "interrupted\n"
    assert process.returncode == 130
    assert list(tmp_path.iterdir()) == []


def test_output_that_is_a_file(tmp_path, capsys):
    pytest.importorskip("cacovid_kernels.demo.command")
    (tmp_path / "out").write_text("mine")
    assert "is a file" in refuse(capsys, "demo", "--out", str(tmp_path / "out"))
    assert (tmp_path / "out").read_text() == "mine"


def test_missing_demo_packages_are_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "av", None)
    for name in [name for name in sys.modules if name.startswith("cacovid_kernels.demo.")]:
        monkeypatch.delitem(sys.modules, name)
    assert "pip install cacovid-kernels[demo]" in refuse(capsys, "demo")


def test_doctor_reports_every_backend(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "SECONDS", 0.05)
    assert main(["doctor"]) == 0
    page = capsys.readouterr().out
    for word in ("torch", "native module", "backends", "usable", *ck.backends()):
        assert word in page
    assert "reference        works" in page


def test_doctor_finds_a_backend_that_differs(monkeypatch, capsys):
    if ck.backends()["cpu"]:
        pytest.skip(ck.backends()["cpu"])
    calls = iter(range(10**6))
    monkeypatch.setattr(doctor, "SECONDS", 0.05)
    monkeypatch.setitem(doctor.PROBES, "unsteady", lambda generator, device: (torch.tensor(next(calls)),))
    assert main(["doctor"]) == 1
    page = capsys.readouterr().out
    assert "cpu              WRONG: unsteady differs" in page
    assert "NOT usable" in page


def test_doctor_finds_a_wrong_answer_and_a_crash(monkeypatch):
    monkeypatch.setitem(doctor.KNOWN_ANSWERS, "sum", (lambda device: torch.tensor([3]), [4]))
    assert doctor.self_test("reference", 0.0) == ("", "sum gave [3] instead of [4]")
    monkeypatch.setitem(doctor.KNOWN_ANSWERS, "sum", (lambda device: 1 // 0, [4]))
    assert "ZeroDivisionError" in doctor.self_test("reference", 0.0)[1]


def test_doctor_says_why_a_backend_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "SECONDS", 0.05)
    monkeypatch.setattr(ck, "backends", lambda: {"cpu": "no compiler was found", "reference": ""})
    assert main(["doctor"]) == 0
    assert "not available: no compiler was found" in capsys.readouterr().out


def test_doctor_says_what_cuda_tensors_are_served_by(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "SECONDS", 0.0)
    monkeypatch.setattr(ck, "backends", lambda: {"reference": ""})
    monkeypatch.setattr(triton, "unavailable", lambda device_type=None: "")
    monkeypatch.setattr(cuda, "unavailable", lambda device_type=None: "not built")
    monkeypatch.setattr(_order, "MEASURED", ())
    assert main(["doctor"]) == 0
    page = capsys.readouterr().out
    assert '"auto" takes for CUDA tensors (a guess: nothing was measured yet)' in page
    gather = next(line for line in page.splitlines() if line.startswith("  gather_rows "))
    assert re.search(r"cuda: .+; here triton, cuda cannot serve", gather)
    assert re.search(r"head_scores +triton: there is no CUDA kernel for it\n", page)
    monkeypatch.setattr(_order, "MEASURED", ("nvidia-h200.jsonl",))
    monkeypatch.setattr(cuda, "unavailable", lambda device_type=None: "")
    main(["doctor"])
    page = capsys.readouterr().out
    assert "(measured in nvidia-h200.jsonl)" in page
    assert "cannot serve" not in page


@pytest.mark.parametrize(
    "built, text",
    [
        (None, "none. Install again with nvcc"),
        ("80-real,90", "for sm_80, sm_90 and newer; GPU 0: covered; GPU 1: its kernels are for sm_80, sm_90"),
    ],
)
def test_doctor_says_which_gpus_the_kernels_cover(monkeypatch, built, text):
    monkeypatch.setattr(cuda, "architectures", lambda: built)
    monkeypatch.setattr(cuda, "EMULATED", False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: [(9, 0), (7, 5)][device])
    assert doctor._cuda_kernels().startswith(text)


def test_doctor_leaves_out_what_a_backend_has_no_kernel_for(monkeypatch):
    def absent(*args):
        raise RuntimeError("backend 'cpu' has no kernel for fly. Use 'auto', which knows who has.")

    if ck.backends()["cpu"]:
        pytest.skip(ck.backends()["cpu"])
    monkeypatch.setitem(doctor.KNOWN_ANSWERS, "fly", (absent, [1]))
    monkeypatch.setitem(doctor.PROBES, "fly", absent)
    right, fault = doctor.self_test("cpu", 0.0)
    assert fault == ""
    assert right.startswith("4 known answers")
    assert right.endswith("; no kernels for fly")


def _environment():
    return {**os.environ, "PYTHONPATH": str(Path(ck.__file__).parents[1])}
