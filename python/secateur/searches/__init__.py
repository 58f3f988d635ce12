"""Searches over plans: rounds of pruning towards an objective, and pruning block by block."""
