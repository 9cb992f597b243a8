"""Writes a mail's header fields so that they read back exactly as given, whatever version of Python runs.

The library's own folding (email.policy) loses or adds spaces, tears characters apart and glues encoded words
together, in each version differently (cpython#92081, #144156, #80222). Here a text is left as it is where
the standards allow that. Otherwise all of it is put into encoded words (RFC 2047), its spaces included, so
nothing depends on what a reader makes of the white space between a plain word and an encoded one.

`token`, `text` and `mailbox` answer a whole field with its CRLF, in ASCII. They raise HeaderError for what no
field may hold, another ValueError for a value that does not fit.
"""

from __future__ import annotations

import base64
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator

LINE = 78  # characters of a line that should not be exceeded (RFC 5322, 2.1.1)
LONGEST_LINE = 998  # characters of a line that must not be exceeded (the same)
ENCODED_LINE = 76  # characters of a line with an encoded word (RFC 2047, 2)
ENCODED_WORD = 75  # characters of an encoded word (the same)
FRAME = len("=?utf-8?q??=")
# What begins like an encoded word is never left plain: many readers decode it wherever it stands.
LIKE_ENCODED = "=?"

ATOM = re.compile(r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+")  # RFC 5322, 3.2.3
# RFC 2047, 5: only printable characters and white space. Of these a line break would end the field, and a
# lone surrogate is no character. By number: what Python knows as printable differs between its versions.
UNWANTED = re.compile("[\0-\x08\n-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
# RFC 2047, 5 (3), the strictest set: what may stand for itself in a Q-encoded word, wherever that stands.
Q_PLAIN = frozenset(b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789!*+-/")
Q_CODES = [chr(byte) if byte in Q_PLAIN else f"={byte:02X}" for byte in range(256)]
Q_CODES[ord(" ")] = "_"

ZERO_WIDTH_JOINER = "\u200d"
JOINED = "\u200c\u200d\u0e33\u0eb3"  # the zero-width joiners, the vowel AM of Thai and Lao
# Signs that stand above or around the digits that follow them.
AROUND = "\u0600\u0601\u0602\u0603\u0604\u0605\u06dd\u070f\u0890\u0891\u08e2\U000110bd\U000110cd"
VIRAMA = 9  # the combining class of what joins consonants of Indic scripts
# Parts of Korean syllables, and which of them go on in which (UAX 29, GB6 to GB8).
JAMO = (
    ("L", "\u1100", "\u115f"),
    ("V", "\u1160", "\u11a7"),
    ("T", "\u11a8", "\u11ff"),
    ("L", "\ua960", "\ua97c"),
    ("V", "\ud7b0", "\ud7c6"),
    ("T", "\ud7cb", "\ud7fb"),
)
KOREAN = {
    *[("L", part) for part in ("L", "V", "LV", "LVT")],
    *[(part, following) for part in ("V", "LV") for following in "VT"],
    *[(part, "T") for part in ("T", "LVT")],
}


class HeaderError(ValueError):
    """A text cannot stand in a header field because of one `character`; the message names both."""

    def __init__(self, what: str, character: str) -> None:
        super().__init__(f"{what} holds {describe(character)}")
        self.character = character


def describe(character: str) -> str:
    """Name a character that cannot be shown."""
    number = f"U+{ord(character):04X}"
    if "\ud800" <= character <= "\udfff":
        return f"half of a character ({number})"
    if is_line_break(character):
        return f"a line break ({number})"
    return f"the control character {number}"


def is_line_break(character: str) -> bool:
    """Whether programs may take a character for the end of a line."""
    return len(f".{character}.".splitlines()) > 1


def check(what: str, text: str) -> None:
    """Raise HeaderError, which says what the text is, if it can stand in no header field."""
    if found := UNWANTED.search(text):
        raise HeaderError(what, found.group())


def token(name: str, value: str) -> str:
    """A field whose value is never folded, such as an address, a Message-ID or a URL: in ASCII."""
    line = f"{name}: {value}"
    if not value.isascii() or not value.isprintable() or len(line) > LONGEST_LINE:
        check(name, value)
        most = LONGEST_LINE - len(f"{name}: ")
        raise ValueError(f"{name} is not ASCII, or longer than {most} characters: {value[:most]!a}")
    return f"{line}\r\n"


def text(name: str, value: str) -> str:
    """A field of free text, such as Subject ("unstructured", RFC 5322, 2.2.1)."""
    check(name, value)
    if _is_plain(value) and value == value.strip(" "):
        # Readers may take the white space of a fold for one space: folded is only at single ones.
        lines = [f"{name}: {value}"] if "  " in value else _fold(name, value.split(" "))
        if max(map(len, lines)) <= (LINE if "  " in value else LONGEST_LINE):
            return _field(lines)
    return _field(_encoded(name, value))


def mailbox(name: str, display_name: str, address: str) -> str:
    """A field with one mailbox, such as From (RFC 5322, 3.4). The address is a dot-atom, `@` and a domain."""
    if not display_name:
        return token(name, address)
    check(name, display_name)
    address = f"<{address}>"
    words = display_name.split(" ")
    if _is_plain(display_name):
        if all(map(ATOM.fullmatch, words)):
            lines = _fold(name, [*words, address])
            if max(map(len, lines)) <= LONGEST_LINE:
                return _field(lines)
        quoted = '"' + re.sub(r'(["\\])', r"\\\1", display_name) + '"'
        # Never folded: readers disagree on what a line break within quotes is.
        if len(f"{name}: {quoted}") <= LINE:
            return _field(_fold(name, [quoted, address]))
    lines = _encoded(name, display_name)
    if len(f"{lines[-1]} {address}") <= ENCODED_LINE:
        lines[-1] += f" {address}"
    else:
        lines.append(f" {address}")
    return _field(lines)


def _is_plain(value: str) -> bool:
    return value.isascii() and "\t" not in value and LIKE_ENCODED not in value


def _field(lines: Iterable[str]) -> str:
    return "".join(f"{line}\r\n" for line in lines)


def _fold(name: str, words: list[str]) -> list[str]:
    """Lines of at most LINE characters, longer only where a single word is. The first has a word, always."""
    lines = [f"{name}: {words[0]}"]
    for word in words[1:]:
        if len(lines[-1]) + 1 + len(word) > LINE:
            lines.append(f" {word}")
        else:
            lines[-1] += f" {word}"
    return lines


def _encoded(name: str, value: str) -> list[str]:
    """Lines with one encoded word each (RFC 2047, 2), which holds whole characters, as readers see them."""
    characters = list(_characters(value))
    sizes = list(map(_q_size, characters))
    first, room = ENCODED_LINE - len(f"{name}: ") - FRAME, ENCODED_WORD - FRAME
    # The shorter one. Characters of many bytes fit into a word as base64 only: 3 bytes take 4 places.
    if sum(sizes) <= 4 * -(-len(value.encode()) // 3) and max(sizes) <= first:
        words = [f"=?utf-8?q?{_q(word)}?=" for word in _split(characters, _q_size, first, room)]
    else:
        words = [
            f"=?utf-8?b?{base64.b64encode(word.encode()).decode()}?=" if word else ""
            for word in _split(characters, _b_size, first // 4 * 3, room // 4 * 3)
        ]
    # Without room for one character behind the name the field begins on the next line.
    head = f"{name}: {words[0]}" if words[0] else f"{name}:"
    return [head, *(f" {word}" for word in words[1:])]


def _split(characters: Iterable[str], size: Callable[[str], int], first: int, room: int) -> list[str]:
    """Fill words with characters. Only one that is larger than a word is torn, if possible before no mark."""
    words, left = [""], first
    for character in characters:
        parts = [character]
        if size(character) > room:
            parts = []
            for point in character:
                if parts and _extends(point) and size(parts[-1] + point) <= room:
                    parts[-1] += point
                else:
                    parts.append(point)
        for part in parts:
            needed = size(part)
            if needed > left:
                words.append("")
                left = room
            words[-1] += part
            left -= needed
    return words


def _q(word: str) -> str:
    """RFC 2047, 4.2."""
    return "".join([Q_CODES[byte] for byte in word.encode()])


def _q_size(word: str) -> int:
    return len(_q(word))


def _b_size(word: str) -> int:
    return len(word.encode())


def _characters(value: str) -> Iterator[str]:
    """Cut a text into what readers see as one character: grapheme clusters (Unicode, UAX 29), or larger ones.

    Marks that came with a version of Unicode that this Python does not know may be cut off: their text reads
    the same all the same.
    """
    if value.isascii():
        yield from value
        return
    start = flags = 0
    for at in range(1, len(value)):
        before, here = value[at - 1], value[at]
        # Two regional indicators are a flag.
        flags = flags + 1 if _is_flag(before) else 0
        if not _joins(value[start], before, here) and not (_is_flag(here) and flags % 2):
            yield value[start:at]
            start = at
    if value:
        yield value[start:]


def _joins(first: str, before: str, here: str) -> bool:
    """Whether a code point belongs to the character that began with `first` and so far ends with `before`."""
    if before < "\u0300" and here < "\u0300":
        return False
    if _extends(here) or before in AROUND:
        return True
    if before == ZERO_WIDTH_JOINER or unicodedata.combining(before) == VIRAMA:
        # They join pictures to pictures, letters to letters.
        return unicodedata.category(first)[0] == unicodedata.category(here)[0]
    return here >= JAMO[0][1] and (_korean(before), _korean(here)) in KOREAN


def _extends(character: str) -> bool:
    """Whether it belongs to what is before it, whatever that is."""
    return (
        unicodedata.category(character)[0] == "M"  # also what selects a variation, as of emoji
        or character in JOINED
        or "\U0001f3fb" <= character <= "\U0001f3ff"  # the colour of a skin
        or "\U000e0020" <= character <= "\U000e007f"  # the tags of a flag
    )


def _korean(character: str) -> str:
    """What it is of a Korean syllable: L, V and T are its parts in this order, "" is nothing."""
    if "\uac00" <= character <= "\ud7a3":
        return "LVT" if (ord(character) - 0xAC00) % 28 else "LV"
    return next((part for part, first, last in JAMO if first <= character <= last), "")


def _is_flag(character: str) -> bool:
    return "\U0001f1e6" <= character <= "\U0001f1ff"
