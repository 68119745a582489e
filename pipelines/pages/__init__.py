"""Pages of pairs: which pairs, their pictures, their HTML. What they are for: `pipelines.pairs_page`."""
