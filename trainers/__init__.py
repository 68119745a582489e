"""Torch: tables in, weights and metrics out. Knows nothing of Dagster."""
