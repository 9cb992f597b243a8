from __future__ import annotations

import pytest

from campaigns.recipients import RecipientsError, address, parse


def problems(data: bytes | str) -> list[str]:
    with pytest.raises(RecipientsError) as caught:
        parse(data.encode() if isinstance(data, str) else data)
    return [str(problem) for problem in caught.value.problems]


def test_columns_become_variables_and_values_are_stripped() -> None:
    [person] = parse(b"E-mail list,Email,First Name\r\nx, ada@example.com ,Ada\r\n")
    assert person.email == "ada@example.com"
    assert person.fields == {"e_mail_list": "x", "email": "ada@example.com", "first_name": "Ada"}


def test_a_byte_order_mark_and_blank_lines_do_no_harm() -> None:
    people = parse("\ufeffemail,name\n\nada@example.com,Ada\n,\n\ngrace@example.com,Grace\n".encode())
    assert [(person.line, person.email) for person in people] == [
        (3, "ada@example.com"),
        (6, "grace@example.com"),
    ]


def test_a_quoted_field_may_span_lines_and_line_numbers_stay_right() -> None:
    assert problems('email,note\na@example.com,"one\ntwo"\nb@example,x,y\n') == [
        "line 4, column 3: 3 fields, but the header has 2"
    ]


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_the_line_is_the_fields_own_within_a_row_of_several(newline: str) -> None:
    rows = [
        "note,email,x",
        '"one',
        "",
        'two",ada,y',
        'z,bob@example.com,"a',
        'b",more',
        "z,BOB@example.com,y",
        "",
    ]
    assert problems(newline.join(rows)) == [
        "line 4, column 2: 'ada' is not an e-mail address",
        "line 6, column 4: 4 fields, but the header has 3",
    ]
    rows[5] = 'b"'
    assert problems(newline.join(rows))[1] == "line 7, column 2: BOB@example.com is already in line 5"


def test_every_problem_is_reported_with_line_and_column() -> None:
    assert problems("name,email\nAda,ada\nBob,bob@example.com\nBob,BOB@example.com\nEve\n") == [
        "line 2, column 2: 'ada' is not an e-mail address",
        "line 4, column 2: BOB@example.com is already in line 3",
        "line 5, column 2: 1 fields, but the header has 2",
    ]


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "line 1, column 1: empty: expected a header with a column email"),
        (b"\n \n", "line 1, column 1: empty: expected a header with a column email"),
        (b"email,name\n", "line 1, column 1: the list holds no recipients, only a header"),
        (b"mail;name\n", "line 1, column 1: no column email, only mail;name (commas separate columns)"),
        (b"email,1st\n", "line 1, column 2: '1st' is no variable name: use letters, digits, _"),
        (b"email,a b,A-B\n", "line 1, column 3: column a_b is already column 2"),
        (b"email\n\x00\n", "line 2, column 1: the field holds a NUL character"),
        (b'email,x\na@example.com,"y"z\n', "line 2, column 2: not CSV: ',' expected after '\"'"),
        (b'email,x\n"a\n",b,"c\n', "line 3, column 3: not CSV: unexpected end of data"),
        (
            b"email,x\n" + b"a," * 3 + b"b" * 200_000,
            "line 2, column 4: not CSV: field larger than field limit",
        ),
        (b'email,x\n"a\nb",\0\n', "line 3, column 2: the field holds a NUL character"),
        (
            b"email,name\na@example.com,J\xfcrgen\n",
            "line 2, column 2: byte 0xfc at character 16 is not UTF-8: save the list as UTF-8",
        ),
        (
            b"\xef\xbb\xbfemail,\xff",
            "line 1, column 2: byte 0xff at character 7 is not UTF-8: save the list as UTF-8",
        ),
        (
            b"email,unsubscribe\na@example.com,javascript:x\n",
            "line 2, column 2: unsubscribe must be a https:, http: or mailto: URL",
        ),
        (
            "email,unsubscribe\na@example.com,https://example.com/ü\n".encode(),
            "line 2, column 2: unsubscribe must be ASCII and at most 900 characters long",
        ),
        (
            b"email,unsubscribe\na@example.com,https://example.com/?a=?utf-8?q?b?=\n",
            "line 2, column 2: unsubscribe would be decoded by some programs (RFC 2047): write %3D for =",
        ),
        (
            b"email,name\n=?utf-8?q?adam?=@example.com,Adam\n",
            "line 2, column 1: '=?utf-8?q?adam?=@example.com' is not an e-mail address to write to: some",
        ),
        (
            "email\njürgen@example.com\n".encode(),
            "line 2, column 1: 'jürgen@example.com' is not an e-mail address: what is before the @",
        ),
        (
            b"email\n" + b"a" * 65 + b"@example.com\n",
            "is not an e-mail address: the most are 64 characters before the @ and 254 in all",
        ),
    ],
)
def test_a_bad_list_is_refused_with_line_and_column(data: bytes, problem: str) -> None:
    assert any(problem in found for found in problems(data))


@pytest.mark.parametrize(
    "value",
    [
        "ada@example.com",
        "a.b+c=d@mail.example.co.uk",
        "!#$%&'*+-/=?^_`{|}~@example.com",
        "=?x@example.com",
        "o'neil@example.com",
        "x@" + "a" * 60 + ".example",
    ],
)
def test_addresses_that_are_good(value: str) -> None:
    assert address(value) == value


def test_an_international_domain_gets_its_ascii_form() -> None:
    assert address("ada@bücher.example") == "ada@xn--bcher-kva.example"


@pytest.mark.parametrize(
    "value",
    [
        "",
        "ada",
        "@example.com",
        "ada@",
        "a da@example.com",
        "ada@exam ple.com",
        ".ada@example.com",
        "a..b@example.com",
        "ada@-x.example",
        "ada@example.com\nBcc: eve@example.com",
        "ada@example.com>",
        "jürgen@example.com",
        "=?utf-8?q?eve=40evil.example=3e=00?=@example.com",
        "a=?x?Q?b?=c@example.com",
        "=??q??=@example.com",
        "a" * 65 + "@example.com",
        "ada@" + "ü" * 80 + ".example",
        "ada@" + ".".join(["a" * 60] * 5),
    ],
)
def test_addresses_that_are_bad(value: str) -> None:
    assert address(value) is None


def test_ten_thousand_recipients_are_read() -> None:
    data = "email,name\n" + "".join(f"user{n}@example.com,User {n}\n" for n in range(10_000))
    assert len(parse(data.encode())) == 10_000
