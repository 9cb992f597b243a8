"""Messages as no one should write them: Celery's and other clients', with something wrong in one place."""

from __future__ import annotations

import base64
import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

Path = tuple[Any, ...]
# Where the message's own number stands.
MARK = "@MARK@"
IDENTITY = f"odd-{MARK}-id"
SIGNATURE = {
    "task": "trials.tick", "args": [f"called-{MARK}"], "kwargs": {}, "options": {}, "subtask_type": None,
    "immutable": True,
}  # fmt: skip


def message(headers: dict[str, Any], body: Any) -> dict[str, Any]:
    return {
        "body": body,
        "content-type": "application/json",
        "content-encoding": "utf-8",
        "headers": headers,
        "properties": {
            "correlation_id": IDENTITY,
            "reply_to": IDENTITY,
            "delivery_mode": 2,
            "delivery_info": {"exchange": "", "routing_key": "trials"},
            "priority": 0,
            "body_encoding": "base64",
            "delivery_tag": f"tag-{MARK}-tag",
        },
    }


def protocol_2(**embedded: Any) -> dict[str, Any]:
    headers = {
        "lang": "py", "task": "trials.tick", "id": IDENTITY, "root_id": IDENTITY, "parent_id": None,
        "group": None, "group_index": None, "meth": None, "shadow": None, "eta": None, "expires": None,
        "retries": 0, "timelimit": [None, None], "argsrepr": "()", "kwargsrepr": "{}", "origin": "test",
        "ignore_result": False, "replaced_task_nesting": 0, "stamped_headers": None, "stamps": {},
        "published": 1.8e9, "own": "value",
    }  # fmt: skip
    rest = {"callbacks": None, "errbacks": None, "chain": None, "chord": None, **embedded}
    return message(headers, [[f"odd-{MARK}"], {}, rest])


def protocol_1() -> dict[str, Any]:
    body = {
        "task": "trials.tick", "id": IDENTITY, "args": [f"odd-{MARK}"], "kwargs": {}, "retries": 0, "eta": None,
        "expires": None, "utc": True, "callbacks": None, "errbacks": None, "timelimit": [None, None],
        "taskset": None, "chord": None,
    }  # fmt: skip
    return message({}, body)


def bases() -> list[dict[str, Any]]:
    return copy.deepcopy([protocol_2(), protocol_1(), protocol_2(errbacks=[SIGNATURE], chain=[SIGNATURE])])


def paths(value: Any, path: Path = ()) -> Iterator[Path]:
    """Every place in a message, itself among them."""
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        yield from paths(item, (*path, key))


# Headers that mean something to Celery, or have the name of something in a task's request.
NAMES = [
    "timelimit", "headers", "retries", "chain", "chord", "callbacks", "group", "shadow", "stamped_headers", "stamps",
    "compression", "update", "get", "clear", "_children", "children", "delivery_info", "losses", "redelivered",
    "args", "kwargs", "task", "is_eager", "called_directly", "hostname",
]  # fmt: skip
TEXTS = st.one_of(
    st.text(max_size=20),
    st.sampled_from(
        ["", "\x00", "\ud800", "\u202ex", "a\nb", "soon", "99999-01-01", "0001-01-01T00:00:00", "x" * 50_000]
    ),
    st.sampled_from(
        ["zlib", "gzip", "bzip2", "application/x-python-serialize", "text/plain", "binary", "zzz"]
    ),
    st.sampled_from(["trials.unknown", "celery.chain", "celery.backend_cleanup", "base64", "utf-16"]),
)


def typed(kind: str, value: Any) -> dict[str, Any]:
    """As kombu writes what JSON has no type for."""
    return {"__type__": kind, "__value__": value}


TYPED = st.builds(
    typed,
    st.sampled_from(["datetime", "date", "decimal", "uuid", "bytes", "base64", "zzz"]),
    st.sampled_from(["2026-01-01", "1.5", "text", 5, {"hex": "1" * 32, "version": 4}]),
)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([-1, 0, 30, 2**63, 10**400]),
    st.floats(),
    TEXTS,
    TYPED,
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.one_of(TEXTS, st.sampled_from(NAMES)), inner, max_size=4),
    ),
    max_leaves=6,
)


@dataclass(frozen=True)
class Deep:
    """Lists in lists."""

    levels: int


ANY = st.one_of(VALUES, st.builds(Deep, st.sampled_from([50, 199, 201, 500, 940, 2000, 100_000])))
MISSING = object()
# What is done to the text as a whole.
TEXT_CHANGES = ("cut", "twice", "bytes", "body", "text")


@dataclass(frozen=True)
class Recipe:
    """How to make one odd message. `text` says what is done to the whole, if it is not one of its parts."""

    base: int
    path: Path
    value: Any
    text: str = ""
    place: float = 0

    def build(self, number: str) -> bytes:
        made = bases()[self.base]
        if not self.text:
            made = changed(made, self.path, self.value)
        if isinstance(made, dict) and not isinstance(made.get("body"), str | None):
            properties = made.get("properties")
            body = written(made["body"])
            if isinstance(properties, dict) and properties.get("body_encoding") == "base64":
                body = base64.b64encode(body.replace(MARK, number).encode()).decode()
            made["body"] = body
        text = written(made).replace(MARK, number)
        if self.text == "cut":
            text = text[: int(len(text) * self.place)]
        elif self.text == "twice":  # a key twice, of which the last one counts
            name, other = [(n, v) for n, v in made.items()][int(self.place * len(made))]
            text = f'{text[:-1]}, "{name}": {written(other if self.place > 0.5 else self.value)}}}'
        elif self.text == "body":
            text = json.dumps(
                {**json.loads(text), "body": json.loads(text)["body"][: int(self.place * 60)] + "="}
            )
        elif self.text == "text":
            text = written(self.value)
        encoded = text.encode(errors="surrogatepass")
        if self.text == "bytes":
            place = int(len(encoded) * self.place)
            encoded = encoded[:place] + b"\xff\x00" + encoded[place:]
        return encoded


def changed(value: Any, path: Path, new: Any) -> Any:
    if not path:
        return {} if new is MISSING else new
    *outer, last = path
    owner = value
    for key in outer:
        owner = owner[key]
    if new is MISSING:
        del owner[last]
    else:
        owner[last] = new
    return value


def written(value: Any) -> str:
    """JSON, in which what is nested too deep for Python's own writer may be as well."""
    depths: list[int] = []

    def default(deep: Any) -> str:
        depths.append(deep.levels)
        return f"@DEEP{len(depths) - 1}@"

    text = json.dumps(value, default=default)
    for number, levels in enumerate(depths):
        text = text.replace(f'"@DEEP{number}@"', levels * "[" + levels * "]")
    return text


@st.composite
def recipes(draw: Any) -> Recipe:
    base = draw(st.integers(0, len(bases()) - 1))
    if draw(st.integers(0, 9)) == 0:
        place = draw(st.floats(0, 1, exclude_max=True))
        return Recipe(base, (), draw(VALUES), draw(st.sampled_from(TEXT_CHANGES)), place)
    path = draw(st.sampled_from(list(paths(bases()[base]))))
    kind = draw(st.integers(0, 9))
    if kind == 0 and path and path[0] in ("headers", "body", "properties"):
        # A field that is not there, or is in another place.
        owner = path if isinstance(value_at(bases()[base], path), dict) else path[:-1]
        if isinstance(value_at(bases()[base], owner), dict):
            return Recipe(base, (*owner, draw(st.sampled_from(NAMES))), draw(ANY))
    return Recipe(base, path, MISSING if kind == 1 else draw(ANY))


def value_at(value: Any, path: Path) -> Any:
    for key in path:
        value = value[key]
    return value


def every_field() -> Iterator[Recipe]:
    """Each field left out, and of each wrong type."""
    for base, whole in enumerate(bases()):
        for path in paths(whole):
            for value in (MISSING, None, True, 5, "text", [], ["text"], {}, {"key": 1}, Deep(201), Deep(940)):
                yield Recipe(base, path, value)


@cache
def generate(count: int) -> dict[bytes, Recipe]:
    """So many different ones, the same each time."""
    found = {recipe.build(MARK): recipe for recipe in every_field()}

    @settings(max_examples=50, database=None, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(recipes(), min_size=10, max_size=30))
    def collect(several: list[Recipe]) -> None:
        found.update({recipe.build(MARK): recipe for recipe in several})

    for number in range(count):
        if len(found) >= count:
            break
        seed(number)(collect)()
    return dict(list(found.items())[:count])
