"""Training a compression policy: combinations of tokens, rewarded by a frozen model's answers."""
