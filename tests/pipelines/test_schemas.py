import polars as pl
import pytest

from pipelines import schemas

TABLE = schemas.Table(
    "things",
    "thing",
    (
        schemas.Column("thing_id", pl.String, "thing"),
        schemas.Column("share", pl.Float64, "share", nullable=True, low=0.0, high=1.0),
        schemas.Column("number", pl.Int32, "how many"),
        schemas.Column("status", pl.String, "state", values=("ok", "bad")),
    ),
    key=("thing_id",),
    cut_by="whole",
)
GOOD = {"thing_id": ["a", "b"], "share": [0.0, None], "number": [1, 2], "status": ["ok", "bad"]}


def test_a_fitting_frame_comes_back_in_the_declared_order_and_types():
    frame = TABLE.conform(pl.DataFrame(GOOD).select("status", "number", "share", "thing_id"))
    assert dict(frame.schema) == {
        "thing_id": pl.String(),
        "share": pl.Float64(),
        "number": pl.Int32(),
        "status": pl.String(),
    }
    assert frame["number"].to_list() == [1, 2]


def test_a_column_of_nulls_takes_the_declared_type():
    frame = TABLE.conform(pl.DataFrame({**GOOD, "share": [None, None]}))
    assert frame["share"].dtype == pl.Float64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"share": [1.5, 0.0]}, "column share: maximum 1.5 is above 1.0"),
        ({"share": [-0.1, 0.0]}, "column share: minimum -0.1 is below 0.0"),
        ({"share": [float("nan"), 0.0]}, "column share: 1 NaN"),
        ({"number": [1, None]}, "column number: 1 nulls"),
        ({"status": ["ok", "odd"]}, r"column status: found \['odd'\]"),
        ({"number": [1.5, 2.0]}, "column number: expected Int32, found Float64"),
        ({"number": ["1", "2"]}, "column number: expected Int32, found String"),
        ({"share": ["0.5", "0"]}, "column share: expected Float64, found String"),
        ({"thing_id": [1, 2]}, "column thing_id: expected String, found Int64"),
        ({"number": [2**40, 1]}, "another type than declared"),
        ({"extra": [1, 2]}, r"unknown columns \['extra'\]"),
    ],
)
def test_a_column_that_breaks_its_rule_is_refused_by_name(change, message):
    with pytest.raises(schemas.SchemaError, match=message):
        TABLE.conform(pl.DataFrame({**GOOD, **change}))


def test_a_missing_column_is_refused_with_what_was_expected_and_found():
    frame = pl.DataFrame(GOOD).drop("share")
    with pytest.raises(schemas.SchemaError, match=r"missing columns \['share'\].*expected.*found"):
        TABLE.conform(frame)


def test_an_infinite_number_outside_the_range_is_refused():
    with pytest.raises(schemas.SchemaError, match="above"):
        TABLE.conform(pl.DataFrame({**GOOD, "share": [float("inf"), 0.0]}))


@pytest.mark.parametrize("table", schemas.TABLES.values(), ids=lambda t: t.name)
def test_every_declared_table_has_its_key_among_its_columns_and_every_column_a_meaning(table):
    names = [c.name for c in table.columns]
    assert len(set(names)) == len(names)
    assert set(table.key) <= set(names)
    assert all(c.meaning for c in table.columns)
    assert not any(c.nullable for c in table.columns if c.name in table.key)


@pytest.mark.parametrize("table", schemas.TABLES.values(), ids=lambda t: t.name)
def test_every_declared_table_accepts_its_own_empty_frame(table):
    assert table.conform(table.empty()).schema == pl.Schema(table.polars_schema)


def test_the_same_quantity_has_the_same_type_in_every_table():
    types = {}
    for table in schemas.TABLES.values():
        for column in table.columns:
            if column.name.endswith("_id"):
                types.setdefault(column.name, set()).add(str(column.dtype))
    assert {name: found for name, found in types.items() if found != {"String"}} == {}


def test_the_data_dictionary_names_every_column_of_every_table():
    text = schemas.data_dictionary()
    for table in schemas.TABLES.values():
        section = text.split(f"## {table.name}\n")[1].split("\n## ")[0]
        for column in table.columns:
            assert f"| {column.name.replace(schemas.SCORER, '<scorer>')} |" in section
