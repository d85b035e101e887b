"""Thousands of images in shards: each is made once, whatever ends a run, on one machine or many."""
