"""What an external process tells whoever started it: rows of numbers, through Dagster Pipes.

    with reporting.opened() as tell:
        tell({"step": 3, "loss": 0.69})

A process that a Pipes client has started (Dagster's own, for Ray, Kubernetes or a subprocess) finds two environment
variables; without them, and in all ranks of a distributed process but the first, rows go nowhere.

Belongs here: the connection. Does not belong here: what is told, and what is for people (standard output).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

Tell = Callable[[dict[str, Any]], None]
CONTEXT_VARIABLE = "DAGSTER_PIPES_CONTEXT"


def is_listened_to() -> bool:
    """Return whether a Pipes client has started this process, and this is the rank that speaks."""
    return CONTEXT_VARIABLE in os.environ and os.environ.get("RANK", "0") == "0"


@contextlib.contextmanager
def opened() -> Iterator[Tell]:
    """Open Pipes where somebody listens, and give the function that sends a row of JSON's types; once per process.

    Not before a process is replaced (`exec`) or starts its ranks: the one that opens it must be the one that closes it.
    """
    if not is_listened_to():
        yield lambda row: None
        return
    from dagster_pipes import open_dagster_pipes

    with open_dagster_pipes() as pipes:
        yield pipes.report_custom_message
