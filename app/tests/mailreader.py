"""Reads header fields as the standards say, with nothing of the email package, and tries thousands of them.

As a script it needs the application alone, so that the Python of any host can be tried: it prints what it
tried, or fails with the first field that reads otherwise than it was given.
"""

# ruff: noqa: RUF001  letters of other scripts look like Latin ones

from __future__ import annotations

import base64
import hashlib
import random
import re
import sys
from collections.abc import Iterable, Iterator

from campaigns import headers, messages
from campaigns.messages import Mailbox, Template

ENCODED_WORD = re.compile(r"=\?utf-8\?(?:q\?(?P<q>[!->@-~]+)|b\?(?P<b>[A-Za-z0-9+/]+={0,2}))\?=")
ATOM = re.compile(r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~-]+")

# The characters of each script as readers see them: some are several code points.
SCRIPTS: dict[str, list[str]] = {
    "Latin": [*"abcdefghij XYZ", *"äöüßéñÅ", "e\u0301", "a\u030a\u0323"],
    "Cyrillic": [*"абвгдежзийклмно прстуфхцчшщЪЫЬ", "и\u0306"],
    "Greek": [*"αβγδεζηθικλμ νξοπρστυφχψω", "α\u0301"],
    "Arabic": [*"ابتثجحخدذ رزسشصض", "م\u064e", "ن\u0651\u064f", "ی\u200c", "\u0600\u0661"],
    "Hebrew": [*"אבגדהוזחטי כלמנ", "ש\u05c1\u05b8"],
    "Devanagari": [*"अआइ उएकखग", "कि", "\u0915\u094d\u0937", "\u0915\u094d\u200d", "श्री"],
    "Thai": [*"กขคง จฉชซ", "ก\u0e48", "น\u0e49\u0e33"],
    "Chinese": [*"春季新品上市全场五折优惠 限本周末，。《》𠀋"],
    "Japanese": [*"あいうえおカキクケコ漢字 、ー", "か\u3099", "葛\U000e0100"],
    "Korean": [*"안녕하세요 반갑습니다", "\u1112\u1161\u11ab", "\uac00\u11a8"],
    "emoji": [
        *"🎉🚀 ☕",
        "👨\u200d👩\u200d👧\u200d👦",
        "👨🏻\u200d👩🏻\u200d👧🏻\u200d👦🏻",  # 41 bytes
        "🏳️\u200d🌈",
        "👍🏿",
        "🇩🇪",
        "🇯🇵",
        "🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f",
        "1\ufe0f\u20e3",
    ],
    "signs": [*"abc  ,.;:()<>@[]\"'!?=_#$%&*+-/\\^`{|}~", "=?", "?=", "=?utf-8?q?x?=", "=?utf-8?b?eA==?="],
    "words": [
        "word ",
        "longer ",
        "a",
        " ",
        "ü",
        "https://example.com/" + "x" * 60 + " ",
        "=?us-ascii?q?a?= ",
    ],
    "blanks": [*"abü", " ", "  ", "\t", "\u00a0", "\u3000", "\u200b", "\ufeff", "\u202e"],
    "heaps": ["a" + "\u0301" * 30, "a", " ", "\u0915" + "\u094d\u0937" * 9],
}
LONGEST = 45  # bytes of a character that fits into one encoded word
# What a text is put into: plain lines of 78, encoded words of 63 places or 45 bytes, lines of 998.
LENGTHS = [*range(1, 100), *range(100, 200, 7), 300, 985, *range(988, 1002), 2000]


class Misread(Exception):
    """A field reads otherwise than it was given, or is not what the standards allow."""


def require(condition: object, *what: object) -> None:
    if not condition:
        raise Misread(*what)


def read_head(mail: bytes) -> dict[str, str]:
    """The fields of a mail, unfolded (RFC 5322, 2.2.3), by name."""
    head = mail.partition(b"\r\n\r\n")[0].decode("ascii")
    for line in head.split("\r\n"):
        require(len(line) <= 998 and line.strip(" \t") and "\r" not in line and "\n" not in line, line)
        words = [word for word in line.split() if headers.LIKE_ENCODED in word]
        if any(ENCODED_WORD.fullmatch(word) for word in words):
            require(len(line) <= 76, "a line with an encoded word of more than 76", line)
        elif len(line) > 78:
            # Only where a line holds nothing but a long word, or its name and a long word.
            require(len(line.split()) <= 2 or line.startswith("List-"), "a line that could be folded", line)
    fields = {}
    for line in re.sub(r"\r\n(?=[ \t])", "", head).split("\r\n"):
        name, colon, value = line.partition(":")
        require(colon and name not in fields, "not one field", line)
        fields[name] = value.removeprefix(" ")
    return fields


def read_words(words: list[tuple[str, str]], quotes: bool) -> tuple[str, list[str]]:
    """A text from its words and the blanks before each, and what each encoded word held (RFC 2047, 6.2)."""
    text, held, encoded_before = "", [], False
    for blank, word in words:
        found = ENCODED_WORD.fullmatch(word)
        if found:
            require(len(word) <= 75, "an encoded word of more than 75", word)
            try:
                held.append(
                    q(found["q"]) if found["q"] else base64.b64decode(found["b"], validate=True).decode()
                )
            except ValueError as error:
                raise Misread("an encoded word that is no text of its own", word) from error
            word = held[-1]
        else:
            require(headers.LIKE_ENCODED not in word, "readers may take this for an encoded word", word)
            if quotes and word.startswith('"'):
                word = re.sub(r"\\(.)", r"\1", word[1:-1])
        text += word if found and encoded_before else blank + word
        encoded_before = bool(found)
    return text, held


def q(word: str) -> str:
    """RFC 2047, 4.2 (2)."""
    require(re.fullmatch(r"(?:[A-Za-z0-9!*+/_-]|=[0-9A-F]{2})+", word), "not allowed within a phrase", word)
    codes = re.sub(r"=(..)", lambda code: chr(int(code[1], 16)), word.replace("_", " "))
    return codes.encode("latin-1").decode()


def read_text(value: str) -> tuple[str, list[str]]:
    """A field of free text."""
    pieces = re.split(r"([ \t]+)", value)
    return read_words(list(zip(["", *pieces[1::2]], pieces[::2], strict=True)), quotes=False)


def read_mailbox(value: str) -> tuple[str, list[str], str]:
    """Name, what its encoded words held, and address of the one mailbox of a field (RFC 5322, 3.4)."""
    if "<" not in value:
        require(re.fullmatch(r"[^\s,;:\"<>()]+@[A-Za-z0-9.-]+", value), "not one address", value)
        return "", [], value
    words, at, blank = [], 0, ""
    while value[at] != "<":
        found = re.compile(r'(?:"(?:[^"\\]|\\.)*"|[^ \t<>,;:@()\[\]\\".]+)(?=([ \t]+))').match(value, at)
        require(found, "not one phrase", value)
        assert found
        require(found[0][0] == '"' or ATOM.fullmatch(found[0]), "not an atom", value)
        words.append((blank, found[0]))
        blank, at = found[1], found.end(1)
    address = re.fullmatch(r"<([^\s<>\"]+@[A-Za-z0-9.-]+)>", value[at:])
    require(address, "not one address", value)
    assert address
    return *read_words(words, quotes=True), address[1]


def texts(seed: int) -> Iterator[tuple[str, list[str]]]:
    """A script's name, and a text as a list of its characters; the same ones for the same seed."""
    choose = random.Random(seed)
    for script, letters in SCRIPTS.items():
        for length in LENGTHS:
            characters: list[str] = []
            while sum(map(len, characters)) < length:
                letter = choose.choice(letters)
                characters += letter if letter.isascii() else [letter]
            yield script, characters
    for script, letters in SCRIPTS.items():
        # The same character again and again meets every limit, and as the first one.
        for letter in letters[-12:]:
            for length in range(12, 24):
                yield script, [*letter] * length if letter.isascii() else [letter] * length
    everything = [
        letter
        for letters in SCRIPTS.values()
        for letter in letters
        if not letter.isascii() or len(letter) == 1
    ]
    for _ in range(1200):
        yield "mixed", choose.choices(everything, k=choose.randint(1, 90))


def try_all(
    seed: int, addresses: Iterable[str] = ("news@example.com", "n" * 64 + "@" + "e" * 63 + ".example")
) -> str:
    """Write and read every text as a subject and as a name. Answers what was tried, raises Misread."""
    addresses, count = list(addresses), 0
    scripts, written = set(), hashlib.sha256()
    for script, characters in texts(seed):
        text = "".join(characters)
        recipient = f"user{count}@example.com"
        url = f"https://example.com/?u={count}&x=" + "y" * (count % 860)
        origin = Mailbox(text, addresses[count % len(addresses)])
        columns = {"email": recipient, "unsubscribe": url}
        head = messages.check_mail("spring", origin, Template(text, "x"), columns).encode()
        fields = read_head(head + b"\r\n")
        subject, in_subject = read_text(fields["Subject"])
        require(subject == text, "subject", subject, text)
        name, in_name, address = read_mailbox(fields["From"])
        require((name, address) == (text, origin.addr_spec), "From", name, address, text)
        if max(len(character.encode()) for character in characters) <= LONGEST:
            for held in (in_subject, in_name):
                require(apart(held) <= apart(characters), "a character is torn", script, held, text)
        require(read_mailbox(fields["To"]) == ("", [], recipient), "To", fields["To"])
        require(fields["List-Unsubscribe"] == f"<{url}>", "List-Unsubscribe", url)
        require(fields["Message-ID"] == messages.message_id("spring", recipient, origin.domain), "Message-ID")
        scripts.add(script)
        written.update(re.sub(rb"Date: .*", b"", head))
        count += 1
    return (
        f"{count} subjects and {count} names in {len(scripts)} scripts, written as {written.hexdigest()[:16]}"
    )


def apart(parts: list[str]) -> set[int]:
    """Where the parts of a text meet."""
    ends, at = set(), 0
    for part in parts:
        at += len(part)
        ends.add(at)
    return ends


if __name__ == "__main__":
    print(sys.version.split()[0], try_all(int(sys.argv[1]) if len(sys.argv) > 1 else 1))
