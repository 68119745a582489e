import json

import polars as pl
import pytest

from trainers.recorder import Recorder, saved_pairs


def row(step, loss=0.5):
    return {"step": step, "loss": loss, "implicit_accuracy": None}


def pair(step, name):
    unknown = dict.fromkeys(("margin", "confidence", "stability", "metric", "weight"))
    return {"step": step, "pair_id": name, "epoch": 0, "timestep": 3, "loss": 0.1, **unknown}


@pytest.fixture
def opened(tmp_path):
    told = []

    def open_at(first):
        return Recorder(tmp_path, "dpo", 9, first, told.append)

    return open_at, told, tmp_path / "metrics.jsonl"


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_every_row_is_a_json_line_at_once_and_told_with_its_recipe(opened):
    open_at, told, file = opened
    recorder = open_at(0)
    recorder.step(row(1))
    assert lines(file) == [row(1)]
    assert told == [{"recipe": "dpo", "of": 9, **row(1)}]
    recorder.validation(1, {"loss_human": (0.7, 10)}, None)
    assert lines(file)[1] == {"step": 1, "validation": {"loss_human": 0.7}}
    recorder.close()


def test_a_resumed_record_is_cut_back_to_its_checkpoint(opened):
    open_at, _, file = opened
    recorder = open_at(0)
    for step in range(1, 6):
        recorder.step(row(step))
    recorder.close()
    file.write_text(file.read_text() + '{"step": 6, "lo')
    recorder = open_at(3)
    recorder.step(row(4, loss=0.25))
    recorder.close()
    assert [(r["step"], r["loss"]) for r in lines(file)] == [(1, 0.5), (2, 0.5), (3, 0.5), (4, 0.25)]


def test_rows_of_pairs_are_written_by_checkpoint_and_cut_back_too(opened, tmp_path):
    open_at, _, _ = opened
    recorder = open_at(0)
    for step in (1, 2, 3, 4):
        recorder.pairs([pair(step, "a"), pair(step, "b")])
        if step in (2, 4):
            recorder.save_pairs(step)
    recorder.close()
    resumed = open_at(2)
    assert pl.concat(pl.read_parquet(f) for f in saved_pairs(tmp_path))["step"].to_list() == [1, 1, 2, 2]
    resumed.close()


def test_tensorboard_reads_what_was_recorded(opened, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recorder = opened[0](0)
    for step in (1, 2, 3):
        recorder.step(row(step, loss=step / 10))
    recorder.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    found = [(e.step, e.value) for e in events.Scalars("train/loss")]
    assert found == [(s, pytest.approx(s / 10)) for s in (1, 2, 3)]
