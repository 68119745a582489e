"""How a command line ends on bad input: one clear message and status 2 instead of a traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable

from pipelines.config import ConfigError
from pipelines.hub import CheckpointError
from pipelines.prompts import PromptSuiteError
from pipelines.schemas import SchemaError
from pipelines.scoring.checkpoints import ScoringError
from pipelines.scoring.imported import ImportedScoresError
from pipelines.sources import SourceError
from pipelines.tables import StoreError

EXPECTED = (
    *(ConfigError, CheckpointError, ImportedScoresError, PromptSuiteError, SchemaError, ScoringError),
    *(SourceError, StoreError),
    *(FileNotFoundError, FileExistsError, PermissionError, ConnectionError),
)


def run_command(main: Callable[[], int], *more: type[Exception]) -> int:
    """Run `main`; print an expected error (EXPECTED, and `more` of the caller's own) as one line on stderr and return 2."""
    expected: tuple[type[Exception], ...] = (*EXPECTED, *more)
    try:
        return main()
    except expected as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
