"""Pictures of the data: one self-contained HTML page that shows pairs with everything that is known about them.

    pairs/<query>.html        both images, votes, scores, probabilities and reasons of the pairs that a query finds
    pairs/index.html          what pages there are

A page loads nothing and runs nothing: images are small JPEGs within it, and its content policy forbids the rest. Prompts,
names and reasons come from strangers; they reach the page through `pages.elements` alone, which escapes them.

Belongs here: pages as a whole, and how many bytes they have. Does not belong here: what a label means (`labels`), who may be
trained on (`curation`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from pipelines.config import ConfigError
from pipelines.curation import Policy
from pipelines.pages.cards import index_html, page_html
from pipelines.pages.pictures import QUALITIES, Picture, read, uri
from pipelines.pages.queries import QUERIES, Chosen, choose
from pipelines.tables import Store

BUDGET_BYTES = 5_000_000
_SAMPLE = 12


def page(
    store: Store,
    shard_keys: Sequence[str],
    *,
    query: str = "random",
    where: str | None = None,
    order_by: str | None = None,
    policy: Policy | None = None,
    limit: int = 200,
    blur: float = 0.0,
    budget_bytes: int = BUDGET_BYTES,
) -> str:
    """Return a page of the pairs that a query finds, as HTML of at most `budget_bytes` bytes in UTF-8.

    Args:
        shard_keys: `catalogue.shard_keys`: the shards whose images count.
        query: one of QUERIES.
        where: SQL condition on the columns of `preferences` that the pairs fulfil besides.
        order_by: SQL expression in place of the query's order, smallest first; '... DESC' for largest first; null last.
        policy: pairs show its target, or why there is none; where and order_by may use `target_label_0` and
            `target_probability`, and `excluded_because` is then the policy's.
        limit: pairs shown at most.
        blur: standard deviation of a Gaussian in percent of a picture's longer side; the page holds no sharper picture.

    Raises:
        ConfigError: an option is wrong, or the page does not fit into the budget with the smallest pictures.
        tables.StoreError: a label table is missing or old, or a shard is not ingested.
    """
    chosen = choose(store, query, where, order_by, policy, limit, blur)
    return _fitted(chosen, read(store, shard_keys, chosen.uses, blur), budget_bytes)


def write_all(
    store: Store,
    shard_keys: Sequence[str],
    limit: int = 60,
    *,
    policy: Policy | None = None,
    blur: float = 0.0,
    budget_bytes: int = BUDGET_BYTES,
) -> dict[str, str]:
    """Publish a page for each of QUERIES and an index of them; return name -> path, the index as 'index'.

    Raises:
        ConfigError, tables.StoreError: see page.
    """
    chosen = {name: choose(store, name, None, None, policy, limit, blur) for name in QUERIES}
    # One image may be on several pages; a shard is read once for all of them.
    wanted = {image_id for c in chosen.values() for image_id in c.uses}
    pictures = read(store, shard_keys, wanted, blur)
    sizes: dict[str, int] = {}
    for name, of_query in chosen.items():
        content = _fitted(of_query, pictures, budget_bytes).encode()
        store.publish(f"pairs/{name}.html", content)
        sizes[name] = len(content)
    store.publish("pairs/index.html", index_html(chosen, pictures, sizes).encode())
    return {name: store.path("pairs", f"{name}.html") for name in (*chosen, "index")}


def _fitted(chosen: Chosen, pictures: Mapping[str, Picture], budget_bytes: int) -> str:
    """Return the page with the best pictures with which it fits into the budget."""
    uses = Counter({i: n for i, n in chosen.uses.items() if pictures[i].jpeg is not None})
    text = len(page_html(chosen, pictures, {}).encode())
    sample = sorted(uses)[:: max(1, len(uses) // _SAMPLE)]
    for side, quality in QUALITIES:
        # A few pictures say whether it is worth while to encode all.
        few = [(uses[i], len(uri(pictures[i], side, quality))) for i in sample]
        if few and text + uses.total() * sum(n * size for n, size in few) / sum(n for n, _ in few) > budget_bytes:
            continue
        uris = {i: uri(pictures[i], side, quality) for i in uses}
        if text + sum(uses[i] * len(uri) for i, uri in uris.items()) <= budget_bytes:
            return page_html(chosen, pictures, uris)
    raise ConfigError(
        f"pairs: budget_bytes = {budget_bytes:,} is too small for {len(chosen.pairs)} pairs: their text alone takes "
        f"{text:,}; raise it or lower limit = {len(chosen.pairs)}"
    )
