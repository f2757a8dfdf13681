"""The library inside other frameworks; each needs its framework installed only when it is used."""
