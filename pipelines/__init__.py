"""Data logic: tables in, tables out. Knows nothing of Dagster, and of torch only in `pipelines.scoring`."""
