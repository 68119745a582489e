"""The UI in a real browser, over a finished small world: select, materialize, look at what came out.

POLYPHONY_SCREENSHOTS names a folder for the pictures of all pages.
"""

import os
import shutil
from pathlib import Path

import pytest

from pipelines import schemas
from pipelines.config import EvaluationConfig, TrainingConfig, small_world
from pipelines.world.raw import WorldConfig

playwright = pytest.importorskip("playwright.sync_api", reason="needs the extra `browser`")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Debian's chromium"),
]

WORLD = WorldConfig(
    rows_per_shard=80,
    pickapic_shards={"train": 2, "validation": 1, "test": 1},
    pickapic_prompts={"train": 30, "validation": 8, "test": 8},
    hpd_train_prompts=6,
    hpd_test_groups=3,
    hpd_test_groups_of_ten=1,
)
FLAGS = (
    "--no-sandbox --headless --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)
SECONDS = 60
"""What a page may take; the machine may be busy."""


@pytest.fixture(scope="module")
def home(build_home, tmp_path_factory):
    """A home whose every asset is materialized."""
    folder = tmp_path_factory.mktemp("browser") / "home"
    return build_home(
        folder,
        WORLD,
        command=("assets.demo",),
        scorers=small_world(folder).scorers,
        training=TrainingConfig(recipes=("diffusion_dpo",), device="cpu", steps=8, checkpoint_every=4),
        evaluation=EvaluationConfig(prompts=6, seeds=2, steps=4, bootstrap=200),
    )


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS.split())
        yield browser
        browser.close()


class Ui:
    """A page of the UI, and the GraphQL beside it."""

    def __init__(self, page, address, pictures):
        self.page, self.address, self.pictures = page, address, pictures
        self.errors = []
        page.on("pageerror", lambda error: self.errors.append(str(error)))

    def ask(self, query, **variables):
        answer = self.page.request.post(f"{self.address}/graphql", data={"query": query, "variables": variables})
        assert "errors" not in answer.json(), answer.json()["errors"]
        return answer.json()["data"]

    def is_up(self):
        try:
            return self.ask("{ repositoriesOrError { ... on RepositoryConnection { nodes { name } } } }")[
                "repositoriesOrError"
            ].get("nodes")
        except playwright.Error:
            return False

    def location(self):
        nodes = self.ask("{ repositoriesOrError { ... on RepositoryConnection { nodes { location { name } } } } }")
        return nodes["repositoriesOrError"]["nodes"][0]["location"]["name"]

    def open(self, path):
        # Never until the network is idle: the page asks for news for ever.
        self.page.goto(self.address + path, wait_until="domcontentloaded")

    def see(self, text, **more):
        """Wait until a text is on the page."""
        found = self.page.get_by_text(text, **more).first
        playwright.expect(found, f"{self.page.url} never showed {text!r}").to_be_visible(timeout=SECONDS * 1000)
        return found

    def picture(self, name):
        # Rows come with the next answer, canvases with an animation.
        self.page.wait_for_timeout(1500)
        self.page.screenshot(path=self.pictures / f"{name}.png")


@pytest.fixture(scope="module")
def ui(home, browser, eventually, free_port, tmp_path_factory):
    pictures = Path(os.environ.get("POLYPHONY_SCREENSHOTS") or tmp_path_factory.mktemp("screenshots"))
    pictures.mkdir(parents=True, exist_ok=True)
    # As `make ui` does.
    with home.serving("dg", "dev", "--host", "127.0.0.1", "--port", str(free_port), log="ui.txt"):
        page = browser.new_page(viewport={"width": 1600, "height": 1000})
        page.set_default_timeout(SECONDS * 1000)
        ui = Ui(page, f"http://127.0.0.1:{free_port}", pictures)
        eventually(ui.is_up, 120, lambda: f"the UI does not answer: {home.said('ui.txt')}")
        yield ui


RUN = """
query ($id: ID!) {
  runOrError(runId: $id) { ... on Run { status creationTime endTime assetSelection { path } } }
}
"""
CHECKS = """
query ($key: AssetKeyInput!) {
  assetNodeOrError(assetKey: $key) {
    ... on AssetNode {
      assetChecksOrError {
        ... on AssetChecks {
          checks { name executionForLatestMaterialization { status runId evaluation { success } } }
        }
      }
    }
  }
}
"""


@pytest.fixture(scope="module")
def materialized(ui, eventually):
    """The run that a person starts who selects the consensus in the graph and presses Materialize."""
    ui.open("/asset-groups")
    jump = ui.page.get_by_placeholder("Jump to")
    jump.fill("consensus")
    ui.picture("graph")
    ui.see("consensus_report", exact=True)
    ui.page.get_by_text("consensus", exact=True).last.click()
    button = ui.page.locator("button", has_text="Materialize selected").first
    playwright.expect(button, "nothing is selected in the graph").to_be_enabled(timeout=SECONDS * 1000)
    ui.picture("graph_selected")
    newest = "{ runsOrError(limit: 1) { ... on Runs { results { id } } } }"
    before = ui.ask(newest)["runsOrError"]["results"][0]["id"]
    button.click()
    ui.see("Launched run")

    def launched():
        found = ui.ask(newest)["runsOrError"]["results"][0]["id"]
        return found if found != before else None

    run_id = eventually(launched, 30, "Materialize launched no run")

    def ended():
        run = ui.ask(RUN, id=run_id)["runOrError"]
        return run if run["status"] in ("SUCCESS", "FAILURE", "CANCELED") else None

    run = eventually(ended, 120, lambda: f"the run is {ui.ask(RUN, id=run_id)}")
    print(f"\nfrom launch to success: {run['endTime'] - run['creationTime']:.1f} s")
    ui.picture("graph_materialized")
    return {**run, "id": run_id}


def test_the_graph_shows_every_group(ui):
    ui.open("/asset-groups")
    for group in ("ingest", "scores", "labels", "caches", "training", "evaluation"):
        ui.see(group, exact=True)


def test_materialize_runs_the_selected_label_alone_to_success(ui, materialized):
    assert materialized["status"] == "SUCCESS"
    assert [a["path"] for a in materialized["assetSelection"]] == [["consensus"]]
    ui.open(f"/runs/{materialized['id']}")
    ui.see("Success")
    ui.picture("run")


def test_the_asset_page_shows_its_rows_and_columns(ui, home, materialized):
    table = home.store.read(schemas.CONSENSUS)
    ui.open("/assets/consensus")
    ui.see("Row count")
    ui.see(f"{len(table):,}", exact=True)
    ui.see("majority vote (BalancedDPO)")
    ui.see("Columns", exact=True)
    for column in table.columns[:6]:
        ui.see(column, exact=True)
    ui.picture("asset")


def test_a_plot_of_the_asset_is_a_picture_in_its_metadata(ui, materialized):
    ui.open("/assets/consensus?view=events")
    ui.see("[Show Markdown]").click()
    picture = ui.page.locator('img[src^="data:image/"]').first
    playwright.expect(picture, "no plot opens").to_be_visible(timeout=SECONDS * 1000)
    assert picture.evaluate("image => image.complete && image.naturalWidth") > 100
    ui.picture("asset_plot")


def test_the_check_results_of_the_run_are_on_the_asset_page(ui, materialized):
    node = ui.ask(CHECKS, key={"path": ["consensus"]})["assetNodeOrError"]
    checks = node["assetChecksOrError"]["checks"]
    assert {"schema", "unique_key", "rows_accounted"} <= {c["name"] for c in checks}
    for check in checks:
        assert check["executionForLatestMaterialization"]["runId"] == materialized["id"], check
        assert check["executionForLatestMaterialization"]["evaluation"]["success"], check
    ui.open("/assets/consensus?view=checks")
    for check in checks:
        ui.see(check["name"], exact=True)
    playwright.expect(ui.page.get_by_text("Passed").first).to_be_visible()
    ui.picture("asset_checks")


def test_the_launchpad_of_training_describes_its_options(ui):
    ui.open(f"/locations/{ui.location()}/jobs/train/playground")
    ui.see("Launch Run")
    # The pane beside the editor describes where the cursor is.
    ui.see("training_steps").click()
    ui.see("instead of training.steps")
    ui.picture("launchpad")


@pytest.mark.parametrize(
    ("name", "path", "text"),
    [
        ("scores", "/assets/scores/pickscore", "Row count"),
        ("scores_partitions", "/assets/scores/pickscore?view=partitions", "hpd.test-0000000"),
        ("scores_checks", "/assets/scores/pickscore?view=checks", "schema"),
        ("minority", "/assets/minority", "minority_score"),
        ("leaderboard", "/assets/leaderboard?view=events", "diffusion_dpo"),
        ("trained", "/assets/trained/diffusion_dpo", "implicit_accuracy"),
        ("store_status", "/assets/store_status?view=events", "tables are current"),
        ("jobs", "/jobs", "rescore"),
        ("automation", "/automation", "rescoring"),
        ("catalog", "/assets", "accounting"),
        ("lineage_of_preferences", "/assets/preferences?view=lineage", "preferences"),
        ("timeline", "/overview/activity/timeline", "Jobless asset materializations"),
    ],
)
def test_a_page_opens_without_an_error_and_shows_what_it_is_about(ui, materialized, name, path, text):
    ui.errors.clear()
    ui.open(path)
    try:
        ui.see(text)
    finally:
        ui.picture(name)
    assert ui.page.get_by_text("GraphQL error").count() == ui.page.get_by_text("Unexpected error").count() == 0
    assert ui.errors == []
