"""Chooses how many units of each group stay, given a target or ratios."""
