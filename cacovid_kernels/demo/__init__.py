"""`python -m cacovid_kernels demo`: a real video, a Hugging Face model and the library's ops, end to end."""

from __future__ import annotations


class UserError(Exception):
    """Something the caller gave cannot be used; the message is one line and names the remedy."""
