import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from assets import metadata as meta
from pipelines import schemas


def png(width, height):
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "PNG")
    return buffer.getvalue()


def shown(value):
    kind, data = re.fullmatch(r"!\[name\]\(data:image/(png|jpeg);base64,(.*)\)", value.value).groups()
    return kind, base64.b64decode(data)


def test_a_small_picture_is_shown_as_it_is():
    small = png(40, 30)
    assert shown(meta.picture(small, "name")) == ("png", small)


@pytest.mark.parametrize("size", [(300, 200), (1500, 400), (200, 2000)])
def test_a_large_picture_is_shown_smaller_with_its_proportions(size):
    kind, data = shown(meta.picture(png(*size), "name"))
    image = Image.open(io.BytesIO(data))
    assert kind == "jpeg"
    assert len(data) <= meta.MAX_PICTURE_BYTES
    assert image.width / image.height == pytest.approx(size[0] / size[1], rel=0.05)


def test_of_nothing_it_is_not_said_that_it_lay_there_already(store):
    metadata = meta.of_builts(store, schemas.SCORER_PRECISION, [])
    assert metadata["dagster/row_count"] == 0
    assert meta.REUSED not in metadata


def test_what_stands_in_angle_brackets_is_text_in_the_column_tab():
    meanings = {c.name: c.description for c in meta.column_schema(schemas.MINORITY).columns}
    assert meanings["annotator_id"].startswith("'&lt;family>:&lt;id>'")
