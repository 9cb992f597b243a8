"""What Redis refuses for now. Of the client library alone, so that it can be asked without this transport."""

from __future__ import annotations

from redis.exceptions import ResponseError

# Refusals that pass by themselves, here or on the server that takes over.
PASSING = ("NOREPLICAS", "OOM", "READONLY", "MASTERDOWN", "MISCONF", "BUSY", "LOADING", "UNBLOCKED")
# Of these, the ones that another server may not answer with.
ELSEWHERE = ("NOREPLICAS", "READONLY", "MASTERDOWN")


def refusal(error: ResponseError) -> str | None:
    """The code of a refusal that passes by itself."""
    # A pipeline puts what it did before the text.
    code = getattr(error, "status_code", None) or str(error).rpartition("caused error: ")[2].partition(" ")[0]
    return code if code in PASSING else None


def is_lost(error: Exception, errors: tuple[type[Exception], ...]) -> bool:
    """Whether an error means that the connection is lost; `errors` are a transport's `connection_errors`.

    kombu counts KeyError among them, for a race in its poller. Here it is what is wrong with a message.
    """
    return isinstance(error, errors) and not isinstance(error, KeyError)
