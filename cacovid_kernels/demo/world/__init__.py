"""A procedural world of videos with known truth: questions, a small frozen model, a policy, and who answers best."""

from pathlib import Path

MODEL = Path(__file__).parent / "model"  # the frozen LLaVA-OneVision, made by `train_model`
POLICY = Path(__file__).parent / "policy"  # the compression policy trained against it
