"""Dagster: thin. Assets call one function of `pipelines` or `trainers` each and return metadata."""
