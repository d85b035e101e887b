"""Learned plans: the table whose last state lies nearest to what a fine solver reaches (``tuning.tune``)."""
