"""What commands refuse."""

from __future__ import annotations


class UserError(Exception):
    """Something the caller gave cannot be used; the message is one line and names the remedy."""
