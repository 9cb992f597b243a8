"""Greets, safely."""

from markupsafe import escape


def main() -> None:
    """Prints a greeting whose markup is escaped."""
    print(escape("<hello>"))
