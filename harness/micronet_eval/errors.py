"""The two ways an evaluation can end without a report, and text that is safe to print."""

import unicodedata


class InputError(Exception):
    """The input is wrong. The message names the place, the fault and the mend; the command line exits with 2."""


class SubmissionError(Exception):
    """The submission's own code failed or hit a limit; the command line exits with 3."""


def refused(error: OSError, place: object = "") -> InputError:
    """What the system refused, as the message that it is: a name that is too long, a full disk.

    `place` is told where the error itself names no file.
    """
    where, told = error.filename or place, error.strerror or str(error)
    return InputError(f"{where}: {told}" if where else told)


def hidden(character: str) -> bool:
    """Whether a terminal would obey a character, or show nothing: controls, directions, surrogates, private ones."""
    return character not in "\n\t" and unicodedata.category(character) in {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}


LONGEST = 4_000
"""Characters of a message: a name in somebody else's file can have millions."""


def printable(text: str) -> str:
    """Somebody else's text for a terminal: what `hidden` names is written as its escape."""
    return "".join(ascii(c)[1:-1] if hidden(c) else c for c in text)


def message(text: str) -> str:
    """Text of any length, from anybody, as one that may be printed."""
    text = printable(text)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} ..."
