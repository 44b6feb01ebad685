"""Which texts may name something: what people write, on one line, without a say in how it is shown.

Not `str.isprintable`: it refuses spaces and joiners that names on a Mac, in Persian and in Japanese
have, and emoji that are put together.
"""

import unicodedata

INVISIBLE = frozenset({"Cc", "Cf", "Mn", "Me"})  # controls, joiners, marks on nothing
FILLERS = frozenset("\u115f\u1160\u2800\u3164\uffa0")
"""Letters and a sign without a form of their own."""
CONTROLS = frozenset({"Cc", "Cs", "Zl", "Zp"})  # controls, halves of characters, ends of lines
TURNING = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""They change the order in which what follows is shown."""


def is_named(text: str) -> bool:
    """Whether it may be a name; empty, it may."""
    return first_wrong(text) is None


def is_blank(text: str) -> bool:
    """Nothing of it can be seen: a link of it could not be clicked."""
    return all(c.isspace() or c in FILLERS or unicodedata.category(c) in INVISIBLE for c in text)


def first_wrong(text: str) -> str | None:
    """The first character that no name may have."""
    if text.isprintable():
        return None
    wrong = (c for c in text if c in TURNING or unicodedata.category(c) in CONTROLS)
    return next(wrong, None)
