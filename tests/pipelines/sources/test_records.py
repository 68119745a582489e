import json
import os

import pytest

from pipelines.files import Folder
from pipelines.sources import SourceError
from pipelines.sources.records import count_records, first_fields, read_records

BLOCK = 1 << 20


@pytest.fixture
def folder(tmp_path):
    return Folder(str(tmp_path))


@pytest.fixture
def read(tmp_path, folder):
    """Write the bytes as a file and read them as records."""

    def run(content, *span):
        (tmp_path / "rows.json").write_bytes(content if isinstance(content, bytes) else content.encode())
        return list(read_records(folder, "rows.json", *span))

    return run


def numbered(*values):
    return list(enumerate(values))


def test_a_list_gives_its_values_with_their_numbers(read):
    assert read('[{"a": 1}, {"b": [2, {"c": null}]}]') == numbered({"a": 1}, {"b": [2, {"c": None}]})
    assert read(" \n[ ]\n ") == []


def test_white_space_of_every_kind_may_stand_anywhere(read):
    assert read('\r\n\t [\n\t{"a"\n:\t1}\r\n,\n\n{"b":2}\t]\r\n') == numbered({"a": 1}, {"b": 2})


def test_objects_on_lines_of_their_own_are_records(read):
    assert read('{"a": 1}\n{"b": 2}\r\n\n{"c": 3}') == numbered({"a": 1}, {"b": 2}, {"c": 3})
    assert read('{"a": 1}\n') == numbered({"a": 1})


def test_the_byte_order_mark_is_no_part_of_the_first_record(read):
    assert read(b'\xef\xbb\xbf[{"a": 1}]') == numbered({"a": 1})
    assert read(b'\xef\xbb\xbf{"a": 1}\n{"a": 2}') == numbered({"a": 1}, {"a": 2})


def test_a_span_of_records_is_read_and_nothing_behind_it(read):
    content = json.dumps([{"k": k} for k in range(6)])
    assert read(content, 2, 4) == [(2, {"k": 2}), (3, {"k": 3})]
    assert read(content, 4) == [(4, {"k": 4}), (5, {"k": 5})]
    assert read(content, 6, 9) == []
    # Damage behind the span is the business of the shard that it lies in.
    assert read(content[:-10] + "@@@", 0, 3) == [(k, {"k": k}) for k in range(3)]


# --- blocks ----------------------------------------------------------------------------------------------------------


def test_a_record_larger_than_many_blocks_is_read_whole_among_small_ones(read):
    large = {"text": "x" * (5 * BLOCK + 17), "tail": "\u00e9" * 100}
    assert read(json.dumps([{"a": 1}, large, {"b": 2}])) == numbered({"a": 1}, large, {"b": 2})
    lines = "\n".join(json.dumps(r, ensure_ascii=False) for r in ({"a": 1}, large, {"b": 2}))
    assert read(lines) == numbered({"a": 1}, large, {"b": 2})


@pytest.mark.parametrize("shift", range(-6, 7))
def test_a_number_that_is_cut_by_a_block_is_read_whole(read, shift):
    head, numbers = '["', "12345678, -1.5e+10]"
    fill = "x" * (BLOCK + shift - len(head) - len('", '))
    assert read(f'{head}{fill}", {numbers}') == numbered(fill, 12345678, -1.5e10)


@pytest.mark.parametrize("shift", range(-8, 9))
def test_a_record_that_is_cut_by_a_block_anywhere_is_read_whole(read, shift):
    record = {"k": "\u00e9\U0001f600\\", "n": 12.5, "t": True}
    text = json.dumps(record, ensure_ascii=False)
    first = json.dumps({"fill": ""})
    fill = "x" * (BLOCK + shift - len("[") - len(first) - len(", ") - len(text.encode()) // 2)
    assert read(f"[{json.dumps({'fill': fill})}, {text}]") == numbered({"fill": fill}, record)


def test_many_records_over_several_blocks_keep_their_numbers(read):
    records = [{"k": k, "text": "\u00fc" * (k % 700)} for k in range(5000)]
    found = read(json.dumps(records, ensure_ascii=False))
    assert found == list(enumerate(records))
    assert len(json.dumps(records, ensure_ascii=False).encode()) > 3 * BLOCK


# --- what is no list of records --------------------------------------------------------------------------------------


def test_nesting_within_reason_is_read_and_beyond_is_an_error_of_the_file(read):
    assert read("[" + "[" * 100 + "]" * 100 + "]")[0][0] == 0
    with pytest.raises(SourceError, match=r"rows\.json: record 0 is not readable JSON"):
        read("[" + "[" * 200_000 + "]" * 200_000 + "]")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty; expected a JSON list of records"),
        ("  \n", "is empty; expected a JSON list of records"),
        ('"text"', "not a JSON list of records: starts with '\"text\"'"),
        ("7", "not a JSON list of records: starts with '7'"),
        ("null", "not a JSON list of records: starts with 'null'"),
        ("<!DOCTYPE html>", "not a JSON list of records: starts with '<!DOCTYPE html>'"),
        ("version https://git-lfs.github.com/spec/v1\n", "not a JSON list of records: starts with 'version https"),
        ("[@]", "record 0 is not readable JSON"),
        ('[{"a": 1}, {b: 2}]', "record 1 is not readable JSON"),
        ('{"a": 1}\n{"a": \n', "record 1 is not readable JSON"),
        ("[" + "1" * 5000 + "]", "record 0 is not readable JSON"),
    ],
)
def test_what_is_no_list_of_records_is_named_with_what_was_found(read, content, message):
    with pytest.raises(SourceError, match=r"rows\.json: ") as error:
        read(content)
    assert message in str(error.value)


@pytest.mark.parametrize("keep", [1, 5, 9, 20, 35, 50])
def test_a_file_that_ends_in_the_middle_is_an_error_wherever_it_ends(read, keep):
    content = json.dumps([{"text": "one"}, {"text": "two"}, {"text": "three"}])
    assert keep < len(content)
    with pytest.raises(
        SourceError, match=r"rows\.json: (record \d is not readable JSON|ends after \d records).*fetch it"
    ):
        read(content[:keep])


def test_a_list_of_numbers_that_ends_in_the_middle_is_an_error_too(read):
    with pytest.raises(SourceError, match=r"ends after 2 records without the closing bracket"):
        read("[1, 23")


@pytest.mark.parametrize("rest", ['[{"b": 2}]', '{"b": 2}', "]", "garbage", "\0\0\0"])
def test_what_stands_behind_the_list_is_not_passed_over(read, rest):
    with pytest.raises(SourceError, match=r"rows\.json: .*behind the closing bracket"):
        read('[{"a": 1}]\n' + rest)
    with pytest.raises(SourceError, match=r"rows\.json: .*behind the closing bracket"):
        read('[{"a": 1}]' + " " * (2 * BLOCK) + rest)
    assert read('[{"a": 1}]' + " " * (2 * BLOCK) + "\n") == numbered({"a": 1})


# --- text ------------------------------------------------------------------------------------------------------------


def test_bytes_that_are_no_utf8_stay_in_their_own_text(read):
    found = read(b'[{"a": "caf\xe9"}, {"a": "caf\xc3\xa9"}]')
    assert found == numbered({"a": "caf\udce9"}, {"a": "caf\u00e9"})
    with pytest.raises(UnicodeEncodeError):
        found[0][1]["a"].encode()


def test_a_character_cut_short_at_the_end_of_the_file_is_an_error_of_the_file(read):
    with pytest.raises(SourceError, match=r"record 0 is not readable JSON"):
        read(b'[{"a": "caf\xc3')


def test_line_breaks_within_a_text_are_kept(read):
    assert read('[{"a": "one\ntwo\\nthree"}]') == numbered({"a": "one\ntwo\nthree"})


# --- counting --------------------------------------------------------------------------------------------------------


def test_records_are_counted_again_when_the_file_changes(tmp_path, folder):
    file = tmp_path / "rows.json"
    file.write_text("[{}, {}]")
    assert count_records(folder, "rows.json") == 2
    file.write_text("[{}, {}, {}]")
    os.utime(file, ns=(1, 1))
    assert count_records(folder, "rows.json") == 3
    with pytest.raises(SourceError, match=r"gone\.json: no such file"):
        count_records(folder, "gone.json")


@pytest.mark.parametrize(("content", "fields"), [('[{"a": 1, "b": 2}, 7]', ("a", "b")), ("[7]", ()), ("[]", ())])
def test_the_fields_of_a_file_are_those_of_its_first_record(tmp_path, folder, content, fields):
    (tmp_path / "rows.json").write_text(content)
    assert first_fields(folder, "rows.json") == fields


def test_a_missing_file_is_named(folder):
    with pytest.raises(SourceError, match=r"gone\.json: not a readable JSON file"):
        list(read_records(folder, "gone.json"))
