"""Tiny models of every family as `video_models` gives them, their processors' part played."""

from __future__ import annotations

import hf_models as hf


class Letters:
    """A token per letter."""

    def __call__(self, text, add_special_tokens):
        return {"input_ids": [10 + ord(letter) % 100 for letter in text]}

    def decode(self, row, skip_special_tokens):
        return " ".join(map(str, row.tolist()))

    def batch_decode(self, rows, skip_special_tokens):
        return [self.decode(row, skip_special_tokens) for row in rows]


class Played:
    """A tiny model, and its processor's part played: the question is the number of a prompt."""

    def __init__(self, family):
        self.family, self.network, self.tokenizer = family, hf.tiny(family), Letters()
        self.times = []

    def inputs(self, frames, question, timestamps=None):
        self.times.append(timestamps)
        return hf.batch(self.family, seed=int(question or 0)).inputs
