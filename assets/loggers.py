"""A console log that a person can follow: time, step, message; Dagster's own events are in the UI."""

from __future__ import annotations

import logging
import sys

import dagster as dg


class _OneLine(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        meta = getattr(record, "dagster_meta", {})
        step = meta.get("step_key") or meta.get("job_name") or ""
        text = meta.get("orig_message", record.getMessage())
        error = getattr(getattr(meta.get("dagster_event"), "event_specific_data", None), "error", None)
        while error is not None:
            # Dagster wraps what an asset body raised; the innermost message is the one that says what to do.
            text += f"\n{error.message.rstrip()}"
            error = error.cause
        return f"{self.formatTime(record, '%H:%M:%S')}  {step:<28} {text}"


class _WorthReading(logging.Filter):
    """Messages of asset bodies, failures, and one line per finished step."""

    def filter(self, record: logging.LogRecord) -> bool:
        event = getattr(record, "dagster_meta", {}).get("dagster_event")
        if event is None:
            return record.levelno >= logging.INFO
        kind = event.event_type_value if hasattr(event, "event_type_value") else str(event)
        return record.levelno >= logging.ERROR or kind == "STEP_SUCCESS"


@dg.logger(config_schema=None, description="One line per message of an asset body, failure or finished step.")
def compact_logger(init_context: dg.InitLoggerContext) -> logging.Logger:
    """Return the logger."""
    logger = logging.Logger("polyphony", level=logging.DEBUG)
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(_OneLine())
    handler.addFilter(_WorthReading())
    logger.addHandler(handler)
    return logger
