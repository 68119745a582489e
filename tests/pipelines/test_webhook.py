"""Messages are posted as JSON; what goes wrong is said without the URL's secrets."""

import contextlib
import http.server
import json
import threading

import pytest

from pipelines import webhook

SECRET = "T0000/B0000/very-secret"


class Service(http.server.BaseHTTPRequestHandler):
    """Answers with the statuses that a test gives, the last one for ever, and keeps what it is sent."""

    def do_POST(self):
        self.server.messages.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.server.types.append(self.headers["Content-Type"])
        statuses = self.server.statuses
        self.send_response(statuses.pop(0) if len(statuses) > 1 else statuses[0])
        self.send_header("Location", "/elsewhere")
        self.end_headers()

    def log_message(self, *words):
        pass


@contextlib.contextmanager
def service(*statuses):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Service) as server:
        server.messages, server.types, server.statuses = [], [], list(statuses)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server, f"http://127.0.0.1:{server.server_port}/services/{SECRET}"
        finally:
            server.shutdown()
            thread.join()


def test_a_message_arrives_as_json():
    message = {"text": "Polyphony: it is \N{SNOWMAN}", "errors": ["a", "b"]}
    with service(200) as (server, url):
        webhook.post(url, message)
    assert server.messages == [message]
    assert server.types == ["application/json"]


def test_a_service_that_recovers_is_tried_again():
    with service(503, 429, 204) as (server, url):
        webhook.post(url, {"text": "x"}, waits=(0, 0))
    assert len(server.messages) == 3


@pytest.mark.parametrize(("status", "tries"), [(500, 3), (404, 1), (302, 1)])
def test_an_answer_that_is_no_success_is_an_error_without_the_secret(status, tries):
    with service(status) as (server, url), pytest.raises(webhook.WebhookError) as error:
        webhook.post(url, {"text": "x"}, waits=(0, 0))
    assert len(server.messages) == tries
    assert f"automation.webhook: 127.0.0.1 answered {status}" in str(error.value)
    assert SECRET not in str(error.value)


def test_a_service_that_is_not_there_is_an_error_without_the_secret():
    with service(200) as (_, url):
        pass
    with pytest.raises(webhook.WebhookError, match="could not be reached") as error:
        webhook.post(url, {"text": "x"}, waits=(0,))
    assert SECRET not in str(error.value)


@pytest.mark.parametrize(
    "url", ["file:///etc/secret", "hooks.example.org/secret", "https://", "http://[secret", "http://h:se/"]
)
def test_what_is_no_http_url_is_an_error_that_names_the_option(url):
    with pytest.raises(webhook.WebhookError, match=r"automation\.webhook") as error:
        webhook.post(url, {"text": "x"}, waits=())
    assert "secret" not in str(error.value)
