"""What a process tells a Pipes client: real processes, the protocol's own files."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import dagster_pipes
import pytest

ROOT = Path(__file__).parents[2]
TELLS = """
    import sys
    from pipelines import reporting
    with reporting.opened() as tell:
        tell({"step": 1, "loss": 0.5, "accuracy": None})
        if "fail" in sys.argv:
            raise SystemError("no more")
    print("dagster_pipes" in sys.modules, "dagster" in sys.modules)
"""


@pytest.fixture
def tell(tmp_path):
    """Return a function that runs a process which tells one row, as a Pipes client or a person starts it."""
    context, messages = tmp_path / "context", tmp_path / "messages"
    context.write_text(json.dumps({"asset_keys": ["a"], "run_id": "r", "extras": {}}))

    def run(*arguments, is_launched=True, **variables):
        messages.write_text("")
        if is_launched:
            variables["DAGSTER_PIPES_CONTEXT"] = dagster_pipes.encode_param({"path": str(context)})
            variables["DAGSTER_PIPES_MESSAGES"] = dagster_pipes.encode_param({"path": str(messages)})
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(TELLS), *arguments],
            env={**os.environ, **variables},
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        return done, [json.loads(line) for line in messages.read_text().splitlines()]

    return run


def test_a_launched_process_tells_its_rows(tell):
    done, messages = tell()
    assert done.stdout == "True False\n", done.stderr
    assert [m["method"] for m in messages] == ["opened", "report_custom_message", "closed"]
    assert messages[1]["params"] == {"payload": {"step": 1, "loss": 0.5, "accuracy": None}}


def test_of_several_ranks_the_first_alone_speaks(tell):
    assert len(tell(RANK="0")[1]) == 3
    done, messages = tell(RANK="1")
    assert (done.stdout, messages) == ("False False\n", [])


def test_a_process_that_a_person_started_tells_nobody_and_loads_nothing(tell):
    done, messages = tell(is_launched=False)
    assert (done.stdout, done.stderr, messages) == ("False False\n", "", [])


def test_an_error_closes_the_connection_with_its_reason(tell):
    done, messages = tell("fail")
    assert done.returncode == 1
    assert messages[-1]["method"] == "closed"
    assert messages[-1]["params"]["exception"]["message"] == "SystemError: no more\n"
