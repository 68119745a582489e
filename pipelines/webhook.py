"""Tells somebody elsewhere: one sentence and its facts as JSON, posted to a URL.

Belongs here: the post, its retries, what its errors may say. Does not belong here: what is worth telling.
"""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

TIMEOUT_SECONDS = 10.0
WAITS = (1.0, 3.0)
"""Seconds before each further try."""
OPTION = "automation.webhook"


class WebhookError(RuntimeError):
    """A message could not be posted; the text names the host alone, for paths of webhooks are secrets."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirected post would arrive as a GET without its message."""

    def redirect_request(self, *request: Any, **more: Any) -> None:
        return None


def post(url: str, message: Mapping[str, Any], waits: tuple[float, ...] | None = None) -> None:
    """Post a message as JSON; try again where the service may recover (no answer, status 429 or 5xx).

    Raises:
        WebhookError: the URL is none of http or https, or no try was answered with a status of 2xx.
    """
    try:
        parts = urlsplit(url)
        host = parts.hostname
    except ValueError as error:
        raise WebhookError(f"{OPTION}: not a URL ({error}); set an http or https URL") from error
    if parts.scheme not in ("http", "https") or not host:
        raise WebhookError(f"{OPTION}: found a URL with scheme {parts.scheme!r}; set an http or https URL")
    body = json.dumps(message).encode()
    for wait in (*(WAITS if waits is None else waits), None):
        why, may_recover = _try(url, body)
        if not why:
            return
        if wait is None or not may_recover:
            break
        time.sleep(wait)
    raise WebhookError(f"{OPTION}: {host} {why}; nothing was told. Check the URL and that the service takes JSON posts")


def _try(url: str, body: bytes) -> tuple[str, bool]:
    """Return why a post failed ('' if it did not) and whether another try may succeed."""
    try:
        request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
        with urllib.request.build_opener(_NoRedirect).open(request, timeout=TIMEOUT_SECONDS):
            return "", False
    except urllib.error.HTTPError as error:
        error.close()
        return f"answered {error.code} {error.reason}", error.code == 429 or error.code >= 500
    except urllib.error.URLError as error:
        return f"could not be reached ({error.reason})", True
    except http.client.InvalidURL:
        return "cannot be posted to, its URL holds characters that no URL has", False
    except (OSError, http.client.HTTPException) as error:
        return f"did not answer ({type(error).__name__})", True
