"""Shards and runs behind URLs."""
