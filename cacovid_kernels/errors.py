"""What commands refuse."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """Something the caller gave cannot be used; the message is one line and names the remedy."""


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its name where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


@contextmanager
def refusing(what: str, *kinds: type[Exception]) -> Iterator[None]:
    """Inside, errors of these kinds become a `UserError` about `what`."""
    try:
        yield
    except kinds as error:
        raise UserError(f"{what}: {first_line(error)}") from None
