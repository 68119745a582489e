import json

import polars as pl
import pytest

from pipelines.config import PromptSuiteConfig
from pipelines.prompts import PromptSuiteError, read_suite


def suite(file, column="prompt"):
    return PromptSuiteConfig(name="s", file=str(file), column=column)


@pytest.fixture
def write(tmp_path):
    def run(name, data):
        (tmp_path / name).write_bytes(data if isinstance(data, bytes) else data.encode())
        return tmp_path / name

    return run


def test_each_kind_of_file_gives_the_same_prompts(write, tmp_path):
    files = [
        write("a.txt", 'a cat\n\n"a dog", running\n a cat \n'),
        write("a.csv", 'prompt,x\na cat,1\n"""a dog"", running",2\na cat,3\n'),
        write("a.tsv", 'prompt\tx\na cat\t1\n"a dog", running\t2\n'),
        write("a.json", json.dumps(["a cat", '"a dog", running', None])),
        write("objects.json", json.dumps([{"prompt": "a cat"}, {"prompt": '"a dog", running'}])),
    ]
    pl.DataFrame({"prompt": ["a cat", '"a dog", running']}).write_parquet(tmp_path / "a.parquet")
    for file in [*files, tmp_path / "a.parquet"]:
        assert read_suite(suite(file)) == ["a cat", '"a dog", running'], file.name


def test_a_column_of_another_name_is_named_in_the_suite(write):
    assert read_suite(suite(write("p.tsv", "Prompt\tCategory\nbond\tAbstract\n"), "Prompt")) == ["bond"]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("p.csv", "text\na\n", "column 'prompt' is missing; found \\['text'\\]"),
        ("p.json", '[{"text": "a"}]', "field 'prompt' is missing"),
        ("p.json", '{"prompt": "a"}', "expected a JSON list"),
        ("p.json", "[1]", "expected texts, found 1"),
        ("p.json", "[", "cannot be read"),
        ("p.parquet", "nothing", "cannot be read"),
        ("p.txt", b"\xff\xfe\xff", "cannot be read"),
        ("p.txt", "\n \n", "no prompt found"),
        ("p.doc", "a", "expected .txt"),
    ],
)
def test_a_bad_file_is_named_with_what_was_found(write, name, data, message):
    file = write(name, data)
    with pytest.raises(PromptSuiteError, match=message) as error:
        read_suite(suite(file))
    assert str(file) in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(PromptSuiteError, match=r"no\.txt"):
        read_suite(suite(tmp_path / "no.txt"))
