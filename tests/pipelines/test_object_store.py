"""Raw files and tables on an object store: a real server that speaks S3 (moto's), started here, read through s3fs."""

import contextlib
import io
import json
import logging
import subprocess
import sys
import tarfile
from pathlib import Path

import boto3
import fsspec
import numpy as np
import polars as pl
import pytest
import s3fs
from moto.server import ThreadedMotoServer
from PIL import Image
from polars.testing import assert_frame_equal

from pipelines import __main__ as command
from pipelines import catalogue, ingest, schemas, steps, stored
from pipelines import config as configuration
from pipelines.config import ImagesConfig, SourceConfig
from pipelines.errors import run_command
from pipelines.scoring.parts import Parts
from pipelines.sources import SourceError
from pipelines.tables import Store, StoreError

BUCKET = "polyphony"
RECORDS = 30
FOLDERS = {"pickapic": "pickapic", "hpd": "hpdv2", "tarred": "tarred", "pap": "webdataset"}
LAYOUTS = {"pickapic": "pickapic", "hpd": "hpd", "tarred": "hpd", "pap": "pickapic_webdataset"}
PER_SHARD = ("images", "image_names", "prompts", "votes")
CODE_ROOT = Path(__file__).resolve().parents[2]


class Server:
    """The server, with a rule by which it may refuse requests: (method, path, query) -> bool."""

    def __init__(self):
        self._moto = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
        self._moto.start()
        self.url = "http://{}:{}".format(*self._moto.get_host_and_port())
        self.refused: list[str] = []
        self._rule = None
        inner, server = self._moto._server.app, self._moto._server

        def app(environ, start_response):
            asked = (environ["REQUEST_METHOD"], environ["PATH_INFO"], environ.get("QUERY_STRING", ""))
            if self._rule is None or not self._rule(*asked):
                return inner(environ, start_response)
            self.refused.append(" ".join(asked))
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            body = b"<Error><Code>AccessDenied</Code><Message>Access Denied by the test</Message></Error>"
            if environ["REQUEST_METHOD"] == "HEAD":
                body = b""
            start_response("403 Forbidden", [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
            return [body]

        server.app = app

    @contextlib.contextmanager
    def refusing(self, rule):
        self.refused.clear()
        self._rule = rule
        try:
            yield self.refused
        finally:
            self._rule = None

    def stop(self):
        self._moto.stop()


@pytest.fixture(scope="module")
def server():
    with pytest.MonkeyPatch.context() as patch:
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        running = Server()
        patch.setenv("AWS_ACCESS_KEY_ID", "testing")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_ENDPOINT_URL", running.url)
        patch.delenv("AWS_PROFILE", raising=False)
        s3fs.S3FileSystem.clear_instance_cache()
        yield running
        s3fs.S3FileSystem.clear_instance_cache()
        running.stop()


@pytest.fixture(scope="module")
def client(server):
    """A client that shares nothing with fsspec: what it writes is another process's doing."""
    made = boto3.client("s3", endpoint_url=server.url)
    made.create_bucket(Bucket=BUCKET)
    return made


def upload(client, folder, prefix):
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            client.put_object(
                Bucket=BUCKET, Key=f"{prefix}/{file.relative_to(folder).as_posix()}", Body=file.read_bytes()
            )


@pytest.fixture(scope="module")
def raw_folder(tiny_world, raw_rows, tmp_path_factory):
    """Local raw files: Pick-a-Pic parquet, HPD as folders and as tars, Pick-a-Pic as WebDataset tars."""
    folder = tmp_path_factory.mktemp("raw")
    for name in ("pickapic", "hpdv2"):
        (folder / name).symlink_to(tiny_world / name)
    (folder / "tarred").mkdir()
    for split in ("train", "test"):
        (folder / "tarred" / f"{split}.json").write_bytes((tiny_world / "hpdv2" / f"{split}.json").read_bytes())
        with tarfile.open(folder / "tarred" / f"{split}.tar", "w") as tar:
            tar.add(tiny_world / "hpdv2" / split, split)
    (folder / "webdataset").mkdir()
    for index, split in enumerate(("train", "validation")):
        with tarfile.open(folder / "webdataset" / f"{split}-00000.tar", "w") as tar:
            for number, row in enumerate(raw_rows[20 * index : 20 * (index + 1)]):
                members = {
                    "original_prompt.txt": row["caption"].encode(),
                    "jpg_0.jpg": row["jpg_0"],
                    "jpg_1.jpg": row["jpg_1"],
                    "label_0.txt": str(row["label_0"]).encode(),
                    "label_1.txt": str(row["label_1"]).encode(),
                }
                for extension, data in members.items():
                    info = tarfile.TarInfo(f"{number:06d}.{extension}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return folder


@pytest.fixture(scope="module")
def raw_url(client, raw_folder):
    for name in FOLDERS.values():
        upload(client, (raw_folder / name).resolve(), f"raw/{name}")
    return f"s3://{BUCKET}/raw"


def sources_in(location, names=tuple(FOLDERS), **more):
    """The four sources over a folder or a URL."""
    return [
        SourceConfig(
            name=name,
            layout=LAYOUTS[name],
            location=f"{location}/{FOLDERS[name]}",
            records_per_shard=RECORDS,
            split="train" if name == "pap" else None,
            **more,
        )
        for name in names
    ]


def ingest_sources(store, sources, storage="copy"):
    """Ingest; return the shard keys and those that were not reused."""
    keys, made = [], []
    for source in sources:
        shards = ingest.list_source(source)
        how = ingest.plan(source, shards, ImagesConfig(storage=storage))
        for shard in shards:
            built = ingest.ingest_shard(store, how, shard)
            keys.append(shard.key)
            made += [shard.key] * (not built["votes"].is_reused)
    return keys, made


@pytest.fixture(scope="module")
def local(raw_folder, tmp_path_factory):
    """(store, shard keys) of everything from the local folder into a local store."""
    store = Store(str(tmp_path_factory.mktemp("local") / "store"))
    keys, _ = ingest_sources(store, sources_in(raw_folder))
    return store, keys


@pytest.fixture
def s3_store(client, request):
    return Store(f"s3://{BUCKET}/stores/{abs(hash(request.node.nodeid))}")


def contents(store, tables=PER_SHARD):
    return {(t, m.partition): m.content for t in tables for m in store.manifests(t)}


def jpeg(seed, size=(96, 96)):
    picture = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


# --- the same tables wherever files lie ----------------------------------------------------------------------------


def test_raw_files_on_s3_give_the_same_tables_as_local_ones(raw_url, local, tmp_path):
    store = Store(str(tmp_path / "store"))
    keys, _ = ingest_sources(store, sources_in(raw_url))
    assert keys == local[1]
    assert contents(store) == contents(local[0])
    assert ingest_sources(store, sources_in(raw_url)) == (keys, []), "what did not change is reused"


def test_the_layout_of_a_source_on_s3_is_found_by_its_files(raw_url):
    for source in sources_in(raw_url):
        assert ingest.resolved(source.model_copy(update={"layout": "auto"})).layout == source.layout


def test_a_store_on_s3_holds_the_same_tables_as_a_local_one(raw_folder, local, s3_store):
    keys, _ = ingest_sources(s3_store, sources_in(raw_folder))
    assert keys == local[1]
    assert len(contents(s3_store)) == 4 * len(keys)
    assert contents(s3_store) == contents(local[0])
    for table in PER_SHARD:
        frames = [s.scan(schemas.TABLES[table]).collect() for s in (s3_store, local[0])]
        assert_frame_equal(*frames)


def test_images_can_stay_where_they_are_on_s3_and_are_read_from_there(raw_url, local, s3_store):
    keys, _ = ingest_sources(s3_store, sources_in(raw_url), storage="reference")
    assert keys == local[1]
    for key in keys:
        held, copied = (s.read(schemas.IMAGES, key) for s in (s3_store, local[0]))
        assert held["bytes"].null_count() == len(held)
        assert all(uri.startswith(f"s3://{BUCKET}/raw/") for uri in held["uri"])
        assert held.drop("bytes", "uri", "row_group", "row", "image_column", "byte_offset", "byte_length").equals(
            copied.drop("bytes", "uri", "row_group", "row", "image_column", "byte_offset", "byte_length")
        )
        assert images_of(s3_store, key) == images_of(local[0], key)
        assert s3_store.read(schemas.VOTES, key).equals(local[0].read(schemas.VOTES, key))


def images_of(store, key):
    wanted = store.read(schemas.IMAGES, key)["image_id"].to_list()
    return {
        i.image_id: (i.data, i.status, i.reason) for part in stored.read_images(store, key, wanted, 7) for i in part
    }


@pytest.fixture(scope="module")
def toml(tmp_path_factory, tiny_clip):
    """Write a configuration over a store and a place of raw files; return the file."""

    def write(store, raw, names):
        folder = tmp_path_factory.mktemp("toml")
        sources = "".join(
            f'[[sources]]\nname = "{n}"\nlayout = "{LAYOUTS[n]}"\nlocation = "{raw}/{FOLDERS[n]}"\n'
            f"records_per_shard = {RECORDS}\n"
            for n in names
        )
        file = folder / "polyphony.toml"
        file.write_text(
            f'home = "{folder / "home"}"\nstore = "{store}"\n{sources}'
            f'[[scorers]]\nname = "clip"\nkind = "clip"\ncheckpoint = "{tiny_clip}"\n'
            f'[[scorers]]\nname = "pickscore"\nkind = "pickscore"\ncheckpoint = "{tiny_clip}"\n'
            f'[[backbones]]\nname = "tiny"\nfamily = "tiny"\ncheckpoint = "none"\n'
        )
        return file

    return write


def run(*arguments):
    return run_command(lambda: command.main([str(a) for a in arguments]))


@pytest.fixture(scope="module")
def labelled(toml, raw_folder, raw_url, tmp_path_factory):
    """Two configuration files: all steps were run from local files to a local store, and from S3 to S3."""
    places = {raw_folder: str(tmp_path_factory.mktemp("labelled") / "store"), raw_url: f"s3://{BUCKET}/stores/labelled"}
    files = [toml(store, raw, ("hpd",)) for raw, store in places.items()]
    for file in files:
        assert run("run", "--config", file) == 0
    return files


def opened(file):
    settings = configuration.load(file)
    return settings, Store(settings.store_location)


def test_scores_and_labels_from_s3_to_s3_equal_those_on_a_local_disk(labelled):
    (_, here), (settings, there) = (opened(file) for file in labelled)
    assert not there.is_local
    assert there.current_revisions() == here.current_revisions() != {}
    for table in (*PER_SHARD, *(t.name for t in catalogue.TABLES), "scores", *steps.LABEL_TABLES):
        assert contents(there, [table]) == contents(here, [table]) != {}
    for table in ("catalogue_pairs", "scores", "preferences"):
        frames = [s.scan(schemas.TABLES[table]).collect() for s in (there, here)]
        assert_frame_equal(*frames)
        assert len(frames[0]) > 50
    labels = steps.Labels(there, settings, [s.key for s in ingest.list_shards(settings)])
    assert labels.preferences().is_reused


def test_a_second_run_from_s3_to_s3_makes_nothing_anew(labelled, capsys):
    assert run("run", "--config", labelled[1]) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if " rows" in line]
    assert len(told) > 15
    assert [line for line in told if not line.endswith("unchanged")] == []


def test_the_sql_command_queries_a_store_on_s3_by_the_names_of_its_tables(labelled, capsys):
    (_, here), (_, there) = (opened(file) for file in labelled)
    query = "SELECT count(*) || ' of ' || count(DISTINCT scorer) AS found FROM scores WHERE status = 'ok'"
    assert run("sql", query, "--config", labelled[1]) == 0
    ok = here.scan(schemas.SCORES).filter(pl.col("status") == "ok").select(pl.len()).collect().item()
    assert f"{ok} of 2" in capsys.readouterr().out
    assert f"{there.location}/votes/" in there.read_text("views.sql")
    query = "SELECT 'p' || count(*) AS n FROM preferences JOIN catalogue_prompts USING (prompt_id, prompt, split)"
    assert run("sql", query, "--config", labelled[1]) == 0
    assert f"p{here.require('preferences').rows}" in capsys.readouterr().out


# --- the manifest is the commit ------------------------------------------------------------------------------------


def test_a_file_on_s3_without_its_manifest_is_invisible_and_is_made_again(raw_folder, client, local, s3_store):
    (source,) = sources_in(raw_folder, ["pap"])
    keys, _ = ingest_sources(s3_store, [source])
    name = s3_store.location.removeprefix(f"s3://{BUCKET}/")
    client.delete_object(Bucket=BUCKET, Key=f"{name}/_manifests/votes/{keys[0]}.json")
    assert client.head_object(Bucket=BUCKET, Key=f"{name}/votes/{keys[0]}.parquet")["ContentLength"] > 0
    assert s3_store.manifest("votes", keys[0]) is None
    assert set(s3_store.scan(schemas.VOTES).collect()["source_row"].str.split(":").list.first()) == {
        "validation-00000.tar"
    }
    assert ingest_sources(s3_store, [source]) == (keys, [keys[0]])
    assert contents(s3_store) == {k: v for k, v in contents(local[0]).items() if k[1].startswith("pap.")}


def test_a_manifest_on_s3_whose_file_is_gone_commits_nothing_and_the_file_is_made_again(
    raw_folder, client, local, s3_store
):
    (source,) = sources_in(raw_folder, ["pap"])
    keys, _ = ingest_sources(s3_store, [source])
    name = s3_store.location.removeprefix(f"s3://{BUCKET}/")
    client.delete_object(Bucket=BUCKET, Key=f"{name}/images/{keys[1]}.parquet")
    assert s3_store.manifest("images", keys[1]) is None
    assert ingest_sources(s3_store, [source]) == (keys, [keys[1]])
    assert contents(s3_store) == {k: v for k, v in contents(local[0]).items() if k[1].startswith("pap.")}


@pytest.mark.parametrize("refused", ["images/", "votes/", "_manifests/votes/"])
def test_an_upload_that_is_refused_commits_nothing_and_the_next_run_completes_it(
    refused, raw_folder, server, local, s3_store
):
    (source,) = sources_in(raw_folder, ["pickapic"])
    first = ingest.list_source(source)[0].key
    wanted = s3_store.location.removeprefix("s3:/") + f"/{refused}{first}"

    with (
        server.refusing(lambda method, path, _: method == "PUT" and path.startswith(wanted)) as seen,
        pytest.raises(StoreError, match="could not be uploaded: Access Denied by the test"),
    ):
        ingest_sources(s3_store, [source])
    assert seen
    table = refused.removesuffix("/").removeprefix("_manifests/")
    assert s3_store.manifest(table, first) is None
    assert s3_store.manifests("votes") == []
    assert s3_store.scan(schemas.VOTES).collect().is_empty()
    keys, made = ingest_sources(s3_store, [source])
    assert made == keys
    assert contents(s3_store) == {k: v for k, v in contents(local[0]).items() if k[1].startswith("pickapic.")}


def test_a_large_upload_that_breaks_off_between_its_parts_leaves_nothing_visible(server, s3_store, tmp_path):
    large = tmp_path / "large"
    with large.open("wb") as handle:
        handle.truncate(120_000_000)
    with server.refusing(lambda method, _, query: method == "PUT" and "partNumber=2" in query) as seen:
        with pytest.raises(StoreError):
            s3_store.publish("images/large.parquet", large)
        assert seen
    assert not s3_store.filesystem.exists(f"{s3_store.location}/images/large.parquet")
    s3_store.publish("images/large.parquet", large)
    assert s3_store.filesystem.size(f"{s3_store.location}/images/large.parquet") == 120_000_000


def test_a_rewrite_on_s3_that_breaks_off_never_leaves_the_old_commit_over_new_rows(server, s3_store):
    def prompts(text):
        return pl.DataFrame({"prompt_id": [text], "prompt": [text]})

    s3_store.write(schemas.PROMPTS, prompts("old"), partition="a", made_from="1")
    manifests = s3_store.location.removeprefix("s3:/") + "/_manifests/"
    with (
        server.refusing(lambda method, path, _: method == "PUT" and path.startswith(manifests)),
        pytest.raises(StoreError),
    ):
        s3_store.write(schemas.PROMPTS, prompts("new"), partition="a", made_from="2")
    assert s3_store.manifest("prompts", "a") is None
    s3_store.write(schemas.PROMPTS, prompts("new"), partition="a", made_from="2")
    assert s3_store.read(schemas.PROMPTS, "a")["prompt"].to_list() == ["new"]


def test_a_bucket_that_is_not_there_is_an_error_that_names_it(raw_folder, toml, client, capsys):
    file = toml("s3://no-such-bucket/store", raw_folder, ("pap",))
    assert run("ingest", "--config", file) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1
    assert "no-such-bucket" in error[0]


def test_an_upload_that_is_refused_ends_the_command_with_one_clear_line(
    raw_folder, toml, s3_store, server, client, capsys
):
    file = toml(s3_store.location, raw_folder, ("pap",))
    with server.refusing(lambda method, *_: method == "PUT"):
        assert run("ingest", "--config", file) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1
    assert s3_store.location in error[0]


def test_a_server_that_is_down_ends_the_command_with_one_line_that_names_the_store(
    raw_folder, toml, client, monkeypatch, capsys
):
    other = Server()
    other.stop()
    file = toml(f"s3://{BUCKET}/down", raw_folder, ("pap",))
    s3fs.S3FileSystem.clear_instance_cache()
    with monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", other.url)
        patch.setenv("AWS_MAX_ATTEMPTS", "1")
        patch.setattr(s3fs.S3FileSystem, "retries", 1)
        assert run("ingest", "--config", file) == 2
    s3fs.S3FileSystem.clear_instance_cache()
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1
    assert error[0].startswith(f"error: s3://{BUCKET}/down: ")
    assert other.url in error[0]


def test_a_list_of_records_that_is_refused_fails_its_shard_and_is_not_taken_for_absent(own_raw, server, store):
    (source,) = sources_in(own_raw("hpd")[0], ["hpd"])
    with server.refusing(lambda method, path, _: path.endswith("/hpdv2/train.json")):
        shard, *_ = ingest.list_source(source)
        assert shard.file == "train.json"
        with pytest.raises(SourceError, match=r"train\.json"):
            ingest.ingest_shard(store, ingest.plan(source), shard)
    assert store.manifests("votes") == []


@pytest.mark.parametrize("name", ["pickapic", "pap", "tarred", "hpd"])
def test_a_source_that_refuses_in_the_middle_of_reading_is_named_and_nothing_of_it_is_visible(
    name, raw_url, raw_folder, server, local, tmp_path
):
    store = Store(str(tmp_path / "store"))
    (source,) = sources_in(raw_url, [name])
    shard = ingest.list_source(source)[0]
    image = json.loads((raw_folder / "hpdv2" / "train.json").read_text())[1]["file_path"][0]
    file = {"tarred": "train.tar", "hpd": f"train/{image}"}.get(name, shard.file)
    path = f"/{BUCKET}/raw/{FOLDERS[name]}/{file}"
    how = ingest.plan(source)
    with (
        server.refusing(lambda method, asked, _: method == "GET" and asked == path) as seen,
        pytest.raises(SourceError) as failure,
    ):
        ingest.ingest_shard(store, how, shard)
    assert seen
    assert file in str(failure.value)
    assert "Access Denied by the test" in str(failure.value)
    assert [m for t in PER_SHARD for m in store.manifests(t)] == []
    ingest.ingest_shard(store, how, shard)
    assert contents(store) == {k: v for k, v in contents(local[0]).items() if k[1] == shard.key}


# --- what changes, and what others do ------------------------------------------------------------------------------


@pytest.fixture
def own_raw(client, raw_folder, request):
    """Upload one source's files to a place of the test's own; return its URL and the key's prefix."""

    def make(name):
        prefix = f"own/{abs(hash(request.node.nodeid))}"
        upload(client, (raw_folder / FOLDERS[name]).resolve(), f"{prefix}/{FOLDERS[name]}")
        return f"s3://{BUCKET}/{prefix}", f"{prefix}/{FOLDERS[name]}"

    return make


def test_an_object_that_changed_is_ingested_again_and_the_others_are_not(own_raw, client, raw_rows, store, tmp_path):
    url, prefix = own_raw("pickapic")
    sources = sources_in(url, ["pickapic"])
    keys, _ = ingest_sources(store, sources)
    assert ingest_sources(store, sources) == (keys, [])
    name = next(
        n
        for n in (o["Key"] for o in client.list_objects_v2(Bucket=BUCKET, Prefix=prefix)["Contents"])
        if "train-00001" in n
    )
    file = tmp_path / "changed.parquet"
    before = client.get_object(Bucket=BUCKET, Key=name)["Body"].read()
    pl.read_parquet(io.BytesIO(before)).reverse().write_parquet(file)
    client.put_object(Bucket=BUCKET, Key=name, Body=file.read_bytes())
    again, made = ingest_sources(store, sources)
    assert again == keys
    assert len(made) == 1
    assert "train-00001" in made[0]
    # The same bytes again have the same ETag: who uploads everything anew ingests nothing anew.
    client.put_object(Bucket=BUCKET, Key=name, Body=file.read_bytes())
    assert ingest_sources(store, sources) == (keys, [])


@pytest.mark.parametrize("name", ["hpd", "tarred"])
def test_an_image_on_s3_that_changed_is_read_anew_by_the_same_process(name, own_raw, client, store, tiny_world):
    url, prefix = own_raw(name)
    sources = sources_in(url, [name])
    ingest_sources(store, sources)
    record = json.loads((tiny_world / "hpdv2" / "train.json").read_text())[0]
    image = record["file_path"][0]
    for seed in range(3):
        # Longer or shorter than what lay there.
        new = jpeg(seed, (32 + 64 * seed,) * 2)
        if name == "hpd":
            client.put_object(Bucket=BUCKET, Key=f"{prefix}/train/{image}", Body=new)
        else:
            buffer = io.BytesIO()
            with tarfile.open(fileobj=buffer, mode="w") as tar:
                for file in sorted((tiny_world / "hpdv2" / "train").iterdir()):
                    data = new if file.name == image else file.read_bytes()
                    info = tarfile.TarInfo(f"train/{file.name}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
            client.put_object(Bucket=BUCKET, Key=f"{prefix}/train.tar", Body=buffer.getvalue())
        _, made = ingest_sources(store, sources)
        assert made, "the change is seen"
        held = store.scan(schemas.IMAGES).collect()
        assert set(held["status"]) == {"ok"}
        assert new in held["bytes"].to_list()


def test_a_raw_file_that_another_process_adds_is_listed_by_the_next_look(own_raw, client):
    url, prefix = own_raw("pap")
    (source,) = sources_in(url, ["pap"])
    before = [s.file for s in ingest.list_source(source)]
    data = client.get_object(Bucket=BUCKET, Key=f"{prefix}/{before[0]}")["Body"].read()
    client.put_object(Bucket=BUCKET, Key=f"{prefix}/test-00000.tar", Body=data)
    assert [s.file for s in ingest.list_source(source)] == sorted([*before, "test-00000.tar"])


def test_a_commit_by_another_process_is_seen_without_a_restart(s3_store):
    def texts():
        return s3_store.scan(schemas.PROMPTS).collect()["prompt"].sort().to_list()

    def write(text, partition):
        frame = f"pl.DataFrame({{'prompt_id': ['{text}'], 'prompt': ['{text}']}})"
        script = (
            "import polars as pl\nfrom pipelines import schemas\nfrom pipelines.tables import Store\n"
            f"Store('{s3_store.location}').write(schemas.PROMPTS, {frame}, partition='{partition}', made_from='{text}')"
        )
        subprocess.run([sys.executable, "-c", script], check=True, cwd=CODE_ROOT)

    assert texts() == []
    assert s3_store.manifest("prompts", "b") is None
    write("hers", "b")
    assert texts() == ["hers"]
    s3_store.write(
        schemas.PROMPTS, pl.DataFrame({"prompt_id": ["m"], "prompt": ["mine"]}), partition="a", made_from="1"
    )
    assert texts() == ["hers", "mine"]
    # A rewrite, longer than what was there: neither its size nor its place may be remembered.
    write("hers, and longer " * 50, "b")
    assert texts() == ["hers, and longer " * 50, "mine"]
    assert s3_store.require("prompts", "b").fingerprint == "hers, and longer " * 50
    with s3_store.open_parquet(schemas.PROMPTS, "b") as file:
        assert file.metadata.num_rows == 1


def test_a_reference_into_an_object_that_was_replaced_is_changed_and_one_that_is_gone_is_missing(
    own_raw, client, store
):
    url, prefix = own_raw("hpd")
    sources = sources_in(url, ["hpd"])
    keys, _ = ingest_sources(store, sources, storage="reference")
    key = next(k for k in keys if ".train-" in k)
    good = images_of(store, key)
    uris = dict(store.read(schemas.IMAGES, key).select("image_id", "uri").iter_rows())
    replaced, gone = sorted(good)[:2]
    names = {i: uris[i].removeprefix(f"s3://{BUCKET}/") for i in (replaced, gone)}
    client.put_object(Bucket=BUCKET, Key=names[replaced], Body=jpeg(9))
    client.delete_object(Bucket=BUCKET, Key=names[gone])
    found = images_of(store, key)
    assert {i: v for i, v in found.items() if i not in names} == {i: v for i, v in good.items() if i not in names}
    assert [found[i][:2] for i in (replaced, gone)] == [(None, "changed"), (None, "missing")]
    assert all(uris[i] in found[i][2] for i in names)
    assert prefix in found[gone][2]


def test_no_file_of_a_store_on_s3_is_left_in_the_local_staging_folder(s3_store):
    s3_store.write(schemas.PROMPTS, pl.DataFrame({"prompt_id": ["a"], "prompt": ["a"]}), made_from="1")
    with pytest.raises(schemas.SchemaError):
        s3_store.write(schemas.PROMPTS, pl.DataFrame({"prompt_id": ["a"] * 2, "prompt": ["a"] * 2}), made_from="1")
    fs, root = fsspec.core.url_to_fs(s3_store.location)
    fs.invalidate_cache()
    assert sorted(p[len(root) + 1 :] for p in fs.find(root)) == ["_manifests/prompts/all.json", "prompts/all.parquet"]


def test_a_reference_that_is_refused_for_a_while_fails_the_step_and_gives_no_image_a_status(raw_url, server, store):
    keys, _ = ingest_sources(store, sources_in(raw_url, ["hpd"]), storage="reference")
    good = images_of(store, keys[0])
    with server.refusing(lambda method, path, _: path.endswith(".jpg")), pytest.raises(SourceError, match=r"\.jpg"):
        images_of(store, keys[0])
    assert images_of(store, keys[0]) == good


def test_finished_parts_of_a_killed_run_are_found_again_on_s3_and_removed_with_the_commit(s3_store):
    rows = schemas.SCORES.conform(
        pl.DataFrame(
            {"image_id": ["a", "b", "c"], "prompt_id": ["p", "p", "q"], "score": [0.5, 1.5, None]}
        ).with_columns(status=pl.Series(["ok", "ok", "undecodable"]), reason=pl.Series([None, None, "bad"]))
    )
    killed = Parts(s3_store, "clip/revision=0123456789ab/pap.one", "mark")
    killed.add(rows.head(2), 0)
    killed.add(rows.tail(1), 0)
    other = Parts(s3_store, "clip/revision=0123456789ab/pap.one", "other")
    assert other.read().is_empty()
    found = Parts(s3_store, "clip/revision=0123456789ab/pap.one", "mark")
    assert_frame_equal(found.read().sort("image_id"), rows)
    Parts(s3_store, "clip/revision=0123456789ab/pap.two", "mark").clear()
    assert len(found.read()) == 3
    found.clear()
    assert s3_store.list_files("_parts") == []
    assert found.read().is_empty()
