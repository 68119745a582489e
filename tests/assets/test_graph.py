"""The graph of assets as text, so that a change of it is seen by whoever reviews it."""

import difflib
import os
from pathlib import Path

from assets.definitions import defs

GOLDEN = Path(__file__).parent / "graph.txt"
UPDATE = "POLYPHONY_WRITE_GRAPH"


def text():
    """Return every asset: group, kinds, device, pool, partitions, version; what it reads; what is checked (! stops readers)."""
    graph = defs().resolve_asset_graph()
    lines = []
    for key in sorted(graph.get_all_asset_keys()):
        node, spec = graph.get(key), graph.assets_def_for_key(key)
        parts = [
            node.group_name,
            "+".join(sorted(node.kinds)),
            node.tags["polyphony/device"],
            *([f"pool {pool}"] if (pool := _pool(spec)) else []),
            *(["by shard"] if node.partitions_def is not None else []),
            f"version {node.code_version}",
        ]
        lines.append(f"{key.to_user_string()}: {', '.join(parts)}")
        if node.parent_keys:
            lines.append("  <- " + " ".join(sorted(k.to_user_string() for k in node.parent_keys)))
        names = [c.name + "!" * graph.get_check_spec(c).blocking for c in sorted(node.check_keys, key=lambda c: c.name)]
        if names:
            lines.append("  checks " + " ".join(names))
    return "\n".join(lines) + "\n"


def _pool(definition):
    pools = {op.pool for op in definition.node_def.iterate_op_defs()}
    assert len(pools) == 1
    return pools.pop()


def test_the_graph_is_the_one_that_is_written_down():
    found = text()
    if os.environ.get(UPDATE):
        GOLDEN.write_text(found)
    difference = list(difflib.unified_diff(GOLDEN.read_text().splitlines(), found.splitlines(), "graph.txt", "found"))
    assert not difference, f"if this is intended, run this test with {UPDATE}=1:\n" + "\n".join(difference)
