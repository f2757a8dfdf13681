"""What `make results` and `make study` write: counts, tables, plots, and runs that are not repeated."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("matplotlib")
pytest.importorskip("PIL")

from PIL import Image

from cacovid_kernels.demo.world import evaluate, report, study, tables
from cacovid_kernels.demo.world.evaluate import ALL, TRAINED, Score
from cacovid_kernels.demo.world.questions import KINDS


def score(rule, ratio, tokens, right):
    return Score(rule, ratio, tokens, [right] * len(KINDS), [100] * len(KINDS), named_kept=600, named=1200)


SCORES = [score(ALL, 1.0, 288, 100), score("random", 0.1, 29, 30), score(TRAINED, 0.1, 29, 99),
          score("random", 0.05, 14, 20), score(TRAINED, 0.05, 14, 90)]  # fmt: skip


def test_shares_of_a_score():
    one = SCORES[1]
    assert one.share == 0.3
    assert one.interval == evaluate.wilson(180, 600)
    assert one.on_named == 600 / (29 * 600)
    assert one.named_found == 0.5


def test_tables():
    table = tables.main_table(SCORES).splitlines()
    assert table[0] == "all tokens (288): **100.0 ± 0.3**"
    assert table[2] == "| rule | 10 % (29) | 5 % (14) |"
    assert table[4] == "| random | 30.0 ± 3.7 | 20.0 ± 3.2 |"
    rows = tables.kinds_table(SCORES, 0.05).splitlines()
    assert len(rows) == 2 + 3
    assert rows[-1].endswith("| 90.0 | 90.0 % | 7.1 % | 50.0 % |")


def test_thinned_log():
    lines = [{"step": i + 1, "reward": i / 10, "seldom": 1.0} if i == 0 else {"step": i + 1, "reward": i / 10}
             for i in range(5)]  # fmt: skip
    thin = [json.loads(line) for line in report.thinned("\n".join(map(json.dumps, lines)), 2).splitlines()]
    assert thin == [{"step": 2, "reward": 0.05}, {"step": 4, "reward": 0.25}, {"step": 5, "reward": 0.4}]


def test_the_page_and_its_plots(tmp_path, monkeypatch):
    record = {"questions": 600, "world_seed": 2, "scores": [vars(one) for one in SCORES]}
    (tmp_path / "compression.json").write_text(json.dumps(record))
    steps = [{"step": i, "reward/token": 0.1 * i, "reward/frame": 0.2 / i, "reward/content": 0.1, "entropy": 0.5,
              "kept_ratio": 0.1} for i in range(1, 3)]  # fmt: skip
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, steps)))
    runs = [
        {"sampler": sampler, "ratio": 0.05, "seed": seed, "steps": 4, "kept": 0.0556,
         "reward": [[2, 0.2], [4, 0.3]], "accuracy": [[4, 0.4 + 0.1 * seed]]}
        for sampler in ("combinations", "gumbel_video") for seed in (0, 1)
    ]  # fmt: skip
    (tmp_path / "samplers.jsonl").write_text("\n".join(map(json.dumps, runs)))
    monkeypatch.setattr("sys.argv", ["report", str(tmp_path), "--log", str(tmp_path / "log.jsonl")])
    assert report.main() == 0
    page = (tmp_path / "README.md").read_text()
    assert "| 5.6 % | gumbel_video | 2 | 30.0 (30.0 to 30.0) | 45.0 (40.0 to 50.0) |" in page
    assert "draws of frames earn 15 % in the first 2 steps and 15 % in the last 2, density peaks" in page
    assert "`learning_rate` 0.001 (1e-06)" in page
    for name in ("compression.png", "training.png", "samplers.png"):
        assert name in page
        assert min(Image.open(tmp_path / name).size) > 300


def test_evaluate_writes_counts(tmp_path, monkeypatch, capsys):
    threads = torch.get_num_threads()
    out = tmp_path / "a" / "counts.json"
    argv = ["evaluate", "--count", "12", "--ratios", "0.1", "--threads", str(threads), "--out", str(out)]
    monkeypatch.setattr("sys.argv", argv)
    assert evaluate.main() == 0
    assert "| trained policy |" in capsys.readouterr().out
    scores = [Score(**one) for one in json.loads(out.read_text())["scores"]]
    assert all(sum(one.asked) == 12 for one in scores)
    monkeypatch.setattr("sys.argv", ["evaluate", "--policy", str(tmp_path)])
    assert evaluate.main() == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_study_that_is_stopped_goes_on(tmp_path, monkeypatch, capsys):
    out = tmp_path / "samplers.jsonl"
    argv = ["study", "--out", str(out), "--samplers", "gumbel", "gumbel_video", "--ratios", "0.05", "--seeds", "1",
            "--steps", "2", "--questions", "12", "--threads", str(torch.get_num_threads())]  # fmt: skip
    monkeypatch.setattr("sys.argv", argv)
    assert study.main() == 0
    runs = [json.loads(line) for line in out.read_text().splitlines()]
    assert [run["sampler"] for run in runs] == ["gumbel", "gumbel_video"]
    assert all(run["kept"] == 0.0556 for run in runs)
    assert [step for step, _ in runs[0]["accuracy"]] == [1, 2]
    out.write_text(json.dumps(runs[1]) + "\n")
    capsys.readouterr()
    assert study.main() == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["gumbel"]
