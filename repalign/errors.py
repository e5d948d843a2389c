"""One line for people: what key, what was found, what was expected, what is nearest."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in a configuration, file or argument that its author can mend; shown as one line, no traceback."""


def nearest(found: str, choices: Iterable[str]) -> str:
    """' Did you mean X?' for the choice that is spelt most alike, or '' when none is close."""
    close = difflib.get_close_matches(found, list(choices), n=1, cutoff=0.5)
    return f" Did you mean '{close[0]}'?" if close else ""


def unknown_choice(key: str, found: str, choices: Iterable[str], what: str = "choice") -> UserError:
    """The error for a name that is not among the valid ones."""
    options = list(choices)
    shown = ", ".join(options) if len(options) <= 16 else ", ".join([*options[:8], "...", *options[-4:]])
    return UserError(f"{key}: unknown {what} '{found}'.{nearest(found, options)} Valid: {shown}.")
