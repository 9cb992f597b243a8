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
