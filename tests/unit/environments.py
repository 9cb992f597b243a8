"""Generated environments of an application, for the tests of whatever hands them over."""

from __future__ import annotations

import random

PIECES = [
    *"\\\"'$%#`;&|<>*?~!(){}[]=+-:,./@^ \t", "$HOME", "${HOME}", "$$", "%n", "%%", "\\n", "\\t", "\\x41", "\\u0041",
    "\\\\", "\\\"", "\\$", "$(id)", "`id`", "# no", " #", "//", "export X=1", "{{ x }}",
    "{% x %}", "é", "ü", "привет", "你好", "😀",
    "👩\u200d🚀",
    "\u200b", "\u2028", "\u2029", "\x85", "\xa0", "\ufeff", "\x80", "\u0661", "a", "Z", "0", "yes", "null",
    "0x10", "1e3", "~",
]  # fmt: skip
PLAIN = [
    "",
    " ",
    "  x  ",
    "\t",
    "'",
    '"',
    "''",
    '""',
    "\\",
    "$",
    "%",
    "#",
    "=",
    "a=b",
    "true",
    "012",
    "-",
    '"x"',
    "'x'",
    "x" * 5000,
]


def environment(size: int = 600) -> dict[str, str]:
    """Variables whose values are taken apart by at least one of those who read environment files."""
    source = random.Random(6)
    values = [*PLAIN, *PIECES, *(f" {piece}" for piece in PIECES), *(f"{piece} " for piece in PIECES)]
    while len(values) < size:
        values.append("".join(source.choice(PIECES) for _ in range(source.randrange(1, 12))))
    return {f"TEST_{number}": value for number, value in enumerate(values)}
