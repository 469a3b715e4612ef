"""Duplicates, groups, splits and leaks."""
