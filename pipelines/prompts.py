"""Prompt suites: lists of prompts in a text, CSV, TSV, JSON or parquet file (PartiPrompts, HPDv2's benchmark, your own).

Belongs here: from a file to distinct normalised prompts. Does not belong here: which prompts are evaluated (`trainers`).
"""

from __future__ import annotations

import io
import json
from typing import Any

import fsspec
import polars as pl

from pipelines import identity
from pipelines.config import PromptSuiteConfig


class PromptSuiteError(ValueError):
    """A prompt suite cannot be read; the message names file, column, found and expected."""


def read_suite(suite: PromptSuiteConfig) -> list[str]:
    """Return the suite's distinct prompts, normalised, in the file's order; rows without text are no prompts.

    `.txt` holds a prompt per line; `.csv`, `.tsv` and `.parquet` a column; `.json` a list of texts or of objects.

    Raises:
        PromptSuiteError: the file is missing or damaged, has no such column, or no prompt.
    """
    where = f"prompt suite {suite.name!r}, {suite.file}"
    try:
        with fsspec.open(suite.file, "rb") as handle:
            data = handle.read()
        values = _values(data, suite, where)
    except (OSError, ValueError, pl.exceptions.PolarsError) as error:
        if isinstance(error, PromptSuiteError):
            raise
        raise PromptSuiteError(f"{where}: cannot be read: {error}") from error
    if odd := next((v for v in values if v is not None and not isinstance(v, str)), None):
        raise PromptSuiteError(f"{where}: expected texts, found {odd!r}")
    prompts = dict.fromkeys(p for v in values if v is not None and (p := identity.normalise_prompt(v)))
    if not prompts:
        raise PromptSuiteError(f"{where}: no prompt found")
    return list(prompts)


def _values(data: bytes, suite: PromptSuiteConfig, where: str) -> list[Any]:
    kind = suite.file.rsplit(".", 1)[-1].lower()
    if kind == "txt":
        return data.decode().splitlines()
    if kind == "json":
        listed = json.loads(data)
        if not isinstance(listed, list):
            raise PromptSuiteError(f"{where}: expected a JSON list, found {type(listed).__name__}")
        if odd := next((r for r in listed if isinstance(r, dict) and suite.column not in r), None):
            raise PromptSuiteError(f"{where}: field {suite.column!r} is missing; found {sorted(odd)}")
        return [r[suite.column] if isinstance(r, dict) else r for r in listed]
    if kind == "parquet":
        frame = pl.read_parquet(io.BytesIO(data))
    elif kind in ("csv", "tsv"):
        frame = pl.read_csv(
            io.BytesIO(data),
            separator="," if kind == "csv" else "\t",
            quote_char='"' if kind == "csv" else None,
            infer_schema=False,
        )
    else:
        raise PromptSuiteError(f"{where}: expected .txt, .csv, .tsv, .json or .parquet, found .{kind}")
    if suite.column not in frame.columns:
        raise PromptSuiteError(f"{where}: column {suite.column!r} is missing; found {frame.columns}")
    return frame[suite.column].to_list()
