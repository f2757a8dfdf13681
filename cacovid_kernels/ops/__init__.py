"""The public ops: one file per family, each a docstring, checks and one call into a backend."""
