"""Column lineage: which columns of which upstream tables every column of the label tables and of the scorer report is from.

A column is from another if some value of it can change when the other's do, its row staying. Hence

* what decides which rows there are is lineage of the key (minority.vote_id is from votes.status), while a column that sums
  over votes is also from what decides which of them count and on which pair they are;
* an id by which a row of another table is looked up is lineage on the side that asks (margins.score_0_clip is from
  catalogue_pairs.image_0_id), not on the side where it is the key, and not where both tables have a row per key;
* what only some options use is named whatever the options are (labels.human_votes, tie_policy, generator_term, em,
  smpo_scorer); a file of groups of one's own (labels.groups_file) is no table;
* tables that a step recomputes from others it reads are named by those others (`minority` reads margins and calibration).

Belongs here: the declarations and their expansion for scorers. Does not belong here: how Dagster shows them (`assets`), how
a column is computed (`labels`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pipelines import schemas
from pipelines.schemas import SCORER

EVERY = "{every}"
"""In the name of an upstream table or column: there is one such for every configured scorer; SCORER: the column's own one."""

_Sources = tuple[tuple[str, str], ...]


def lineage(table: str, scorers: Sequence[str]) -> dict[str, list[tuple[str, str]]]:
    """Return column -> [(upstream table, its column)] of a table, in the table's order of columns, sorted, each once.

    An upstream table is named as its Dagster asset, the parts of the key joined by '/': 'votes', 'scores/<scorer>'. A column
    without any is a constant, or an option's.

    Args:
        table: one of TABLES.
        scorers: names of the configured scorers.

    Raises:
        KeyError: the table has no declared lineage.
    """
    if table not in _LINEAGE:
        raise KeyError(f"lineage of table {table!r} is not declared; declared are {list(_LINEAGE)}")
    found = {}
    for template, sources in _LINEAGE[table].items():
        for own in scorers if SCORER in template else ("",):
            expanded = {
                (upstream.replace(EVERY, other).replace(SCORER, own), column.replace(EVERY, other).replace(SCORER, own))
                for upstream, column in sources
                for other in (scorers if EVERY in upstream + column else ("",))
            }
            found[template.replace(SCORER, own)] = sorted(expanded)
    return {column: found[column] for column in (c.name for c in schemas.TABLES[table].of(scorers).columns)}


def _of(table: str, *columns: str) -> _Sources:
    return tuple((table, column) for column in columns)


def _same(columns: Iterable[str], sources: _Sources) -> dict[str, _Sources]:
    return dict.fromkeys(columns, sources)


_CONSTANT: _Sources = ()
"""Nothing of the store: a name in the configuration, a number of the program, or what a manifest says."""

# --- what votes say ------------------------------------------------------------------------------------------------------

_COUNTS = _of("votes", "status") + _of("catalogue_votes", "status")
"""Which votes count."""
_PEOPLE = _of("votes", "count") + _COUNTS
"""For how many they count."""
_ON_PAIR = _of("votes", "pair_id") + _of("catalogue_votes", "pair_id")
_LABEL = _of("votes", "label_0") + _of("catalogue_votes", "is_flipped")
_DECIDED = _PEOPLE + _of("votes", "label_0")
"""Who chose an image: a tie stays one when the images change places."""
_VOTED = _ON_PAIR + _PEOPLE + _LABEL
"""What people say of a pair."""
_ANNOTATOR = _of("votes", "annotator_id")
_SHOWN = _of("votes", "was_swapped") + _DECIDED
"""Votes whose display order is known."""
_CHOSE_FIRST = _SHOWN + _LABEL

# --- what scorers say ----------------------------------------------------------------------------------------------------

_OWN_D = _of("margins", f"score_0_{SCORER}", f"score_1_{SCORER}")
_EVERY_D = _of("margins", f"score_0_{EVERY}", f"score_1_{EVERY}")
_PROMPT = _of("margins", "prompt_id")
"""Gives the fold of a cross-fit, and the clusters of an interval."""
_GENERATORS = _of("margins", "model_0", "model_1")
_Z = _EVERY_D + _of("calibration", "rms")
_SLOPES = _PROMPT + _of("calibration", "slope")
_ENSEMBLE = _Z + _PROMPT + _GENERATORS + _of("calibration", "weight")
"""The cross-fitted logit h."""
_FITTED = _EVERY_D + _PROMPT + _VOTED
_HUMAN = _of("catalogue_pairs", "human_label_0")
_VOTERS = _EVERY_D + _HUMAN
_CONSENSUS_VOTES = _of("consensus", f"vote_{EVERY}")
_AGGREGATED = _CONSENSUS_VOTES + _of("consensus", "random_scorer_label_0", "raw_sum_label_0", "zscore_sum_label_0")
_OF_VOTE = _ON_PAIR + _LABEL
"""The side that a vote chose, on its pair."""
_COMPARED = _of("minority", "annotator_id", "people", "share_against")

# --- what the scorer report joins ----------------------------------------------------------------------------------------

_NAMED = _of("votes", "source") + _ON_PAIR
_PLACES = _of("catalogue_scorables", "image_id", "prompt_id") + _of(
    "catalogue_pairs", "prompt_id", "image_0_id", "image_1_id"
)
_SCORE = _of(f"scores/{EVERY}", "score")
_SCORED_PAIRS = _PLACES + _SCORE
_JUDGED = _NAMED + _DECIDED + _LABEL + _SCORED_PAIRS

_LINEAGE: dict[str, dict[str, _Sources]] = {
    "margins": {
        "pair_id": _of("catalogue_pairs", "pair_id"),
        "prompt_id": _of("catalogue_pairs", "prompt_id"),
        # One vote names both generators where one does, so each is chosen with the other.
        **_same(
            ("model_0", "model_1"),
            _ON_PAIR + _of("votes", "model_0", "model_1") + _of("catalogue_votes", "status", "is_flipped"),
        ),
        **{
            f"score_{i}_{SCORER}": _of(f"scores/{SCORER}", "score")
            + _of("catalogue_pairs", f"image_{i}_id", "prompt_id")
            for i in (0, 1)
        },
    },
    "calibration": {
        "scorer": _GENERATORS,
        "fold": _CONSTANT,
        "slope": _FITTED,
        "weight": _FITTED + _GENERATORS,
        **_same(("rms", "min", "max"), _EVERY_D),
        "logit_scale": _CONSTANT,
        **_same(("accuracy", "ece_raw", "ece_calibrated"), _FITTED + _GENERATORS),
        # Where the ensemble has a logit does not depend on its weights.
        "votes": _EVERY_D + _PROMPT + _ON_PAIR + _DECIDED,
    },
    "reliability": {
        "scorer": _CONSTANT,
        "stage": _CONSTANT,
        **_same(("bin", "votes", "probability"), _ENSEMBLE + _SLOPES + _ON_PAIR + _PEOPLE),
        "agreement": _ENSEMBLE + _SLOPES + _VOTED,
    },
    "consensus": {
        "pair_id": _of("margins", "pair_id"),
        f"vote_{SCORER}": _OWN_D,
        "vote_human": _HUMAN,
        **_same(("votes_0", "votes_1", "voters", "agreement", "consensus_label_0", "decided_by"), _VOTERS),
        # The draw is a hash of the pair's id.
        "random_scorer_label_0": _EVERY_D + _of("margins", "pair_id"),
        **_same(("raw_sum_label_0", "zscore_sum_label_0"), _EVERY_D),
    },
    "consensus_report": {
        "aggregation": _CONSTANT,
        **_same(("level", "pairs"), _CONSENSUS_VOTES),
        "pairs_labelled": _AGGREGATED,
        "votes": _AGGREGATED + _ON_PAIR + _DECIDED,
        "accuracy": _AGGREGATED + _VOTED,
        **_same(("accuracy_low", "accuracy_high"), _AGGREGATED + _VOTED + _PROMPT),
    },
    "smoothed": {
        "pair_id": _of("margins", "pair_id"),
        f"smpo_{SCORER}": _OWN_D + _of("calibration", "min", "max", "logit_scale"),
        f"calibrated_{SCORER}": _OWN_D + _SLOPES,
        "p_smpo": _EVERY_D + _of("calibration", "min", "max", "logit_scale"),
        "p_ensemble": _ENSEMBLE,
        **_same(("p_linear", "p_log"), _EVERY_D + _SLOPES),
        **_same(("z_mean", "z_std"), _Z),
    },
    "minority": {
        "vote_id": _of("votes", "vote_id", "label_0") + _COUNTS + _ON_PAIR,
        "pair_id": _ON_PAIR,
        "annotator_id": _ANNOTATOR,
        "label_0": _LABEL,
        "people": _of("votes", "count"),
        "confidence": _Z + _OF_VOTE,
        "stability": _Z + _ON_PAIR,
        "metric": _Z + _OF_VOTE,
        "minority_score": _ENSEMBLE + _OF_VOTE,
        "annotator_score": _ENSEMBLE + _VOTED + _ANNOTATOR,
        "minority_probability": _ENSEMBLE + _VOTED + _ANNOTATOR,
        "em_probability": _ENSEMBLE + _VOTED + _ANNOTATOR,
        "others": _ON_PAIR + _DECIDED + _ANNOTATOR,
        "share_against": _VOTED + _ANNOTATOR,
    },
    "annotators": {
        "annotator_id": _ANNOTATOR + _COUNTS,
        **_same(("votes", "ties"), _ANNOTATOR + _DECIDED),
        "prompts": _ANNOTATOR + _COUNTS + _ON_PAIR + _PROMPT,
        **_same(("compared", "agreeing"), _COMPARED),
        # A person's votes on one prompt are a cluster, and the prior is fitted to all annotators.
        **_same(
            ("reliability", "reliability_low", "reliability_high"), _COMPARED + _of("minority", "pair_id") + _PROMPT
        ),
        "annotator_score": _of("minority", "annotator_id", "people", "minority_score"),
        "placed": _ANNOTATOR + _SHOWN,
        "first_share": _ANNOTATOR + _CHOSE_FIRST,
        **_same(("first_low", "first_high"), _ANNOTATOR + _CHOSE_FIRST + _ON_PAIR + _PROMPT),
    },
    "rater_agreement": {
        "source": _of("votes", "source") + _COUNTS,
        **_same(("pairs", "ratings"), _of("votes", "source") + _ON_PAIR + _PEOPLE),
        "raters": _of("votes", "source") + _ON_PAIR + _PEOPLE + _ANNOTATOR,
        **_same(("alpha", "alpha_decided", "minority_share"), _of("votes", "source") + _VOTED),
        **_same(("alpha_low", "alpha_high"), _of("votes", "source") + _VOTED + _PROMPT),
        "placed": _of("votes", "source") + _SHOWN,
        "first_share": _of("votes", "source") + _CHOSE_FIRST,
        **_same(("first_low", "first_high"), _of("votes", "source") + _CHOSE_FIRST + _ON_PAIR + _PROMPT),
    },
    "preferences": {
        **{c: _of("catalogue_pairs", c) for c in ("pair_id", "prompt_id", "image_0_id", "image_1_id")},
        **{c: _of("catalogue_prompts", c) + _of("catalogue_pairs", "prompt_id") for c in ("prompt", "split")},
        "sources": _of("votes", "source") + _ON_PAIR,
        "n_votes": _of("catalogue_pairs", "n_votes"),
        "n_decided": _ON_PAIR + _DECIDED,
        "human_label_0": _HUMAN,
        "is_in_cycle": _of("catalogue_pairs", "cycle"),
        "minority_share": _VOTED,
        **_same(("confidence", "stability", "metric"), _Z + _HUMAN),
        "minority_score": _ENSEMBLE + _HUMAN,
        "minority_probability": _of("minority", "pair_id", "label_0", "people", "minority_probability") + _HUMAN,
        "is_unanimous": _EVERY_D + _HUMAN,
        **{
            c: _of("consensus", c)
            for c in (
                "consensus_label_0",
                "agreement",
                "decided_by",
                "random_scorer_label_0",
                "raw_sum_label_0",
                "zscore_sum_label_0",
            )
        },
        **{c: _of("smoothed", c) for c in ("p_smpo", "p_ensemble", "p_linear", "p_log", "z_mean", "z_std")},
        **{c: _of("margins", c) for c in ("model_0", "model_1", f"score_0_{SCORER}", f"score_1_{SCORER}")},
        # An image that nobody scored is told by its margins, others by the scores' and the images' own words.
        "excluded_because": _of(f"scores/{EVERY}", "status", "reason")
        + _of("images", "status", "reason")
        + _of("catalogue_pairs", "prompt_id", "image_0_id", "image_1_id")
        + _EVERY_D,
    },
    "annotator_groups": {
        "annotator_id": _ANNOTATOR + _COUNTS,
        **_same(("votes", "status"), _ANNOTATOR + _ON_PAIR + _DECIDED + _EVERY_D),
        # Folds of prompts choose how many groups there are; the weights are fitted to all votes.
        "group": _ANNOTATOR + _VOTED + _EVERY_D + _PROMPT,
        f"weight_{SCORER}": _ANNOTATOR + _VOTED + _EVERY_D,
    },
    "pair_groups": {
        "pair_id": _of("catalogue_pairs", "pair_id"),
        **_same(("group", "status"), _HUMAN + _VOTED + _ANNOTATOR + _of("annotator_groups", "group")),
    },
    "scorer_report": {
        "scorer": _CONSTANT,
        "source": _NAMED,
        "revision": _CONSTANT,
        "scores": _NAMED + _PLACES,
        **_same(
            ("scores_ok", "scores_not_ok", "statuses_not_ok"),
            _NAMED + _PLACES + _of(f"scores/{EVERY}", "status"),
        ),
        **_same(("mean", "sd", "min", "q05", "q25", "q50", "q75", "q95", "max", "histogram"), _NAMED + _SCORED_PAIRS),
        # The bins are the same for all sources.
        **_same(("histogram_low", "histogram_high"), _of("catalogue_scorables", "image_id", "prompt_id") + _SCORE),
        "pairs": _NAMED,
        "pairs_scored": _NAMED + _SCORED_PAIRS,
        "votes_decided": _NAMED + _DECIDED,
        **_same(("votes_covered", "pairs_decided"), _NAMED + _DECIDED + _SCORED_PAIRS),
        **_same(("accuracy", "accuracy_low", "accuracy_high"), _JUDGED),
        "share_equal": _NAMED + _DECIDED + _SCORED_PAIRS,
    },
    "scorer_correlation": {
        **_same(("scorer_a", "scorer_b"), _CONSTANT),
        **_same(("scores", "pearson", "spearman"), _of("catalogue_scorables", "image_id", "prompt_id") + _SCORE),
        **_same(("pairs", "pearson_d", "spearman_d", "pairs_decided", "agreement"), _SCORED_PAIRS),
    },
}

TABLES = tuple(_LINEAGE)
"""The tables whose lineage is declared."""
