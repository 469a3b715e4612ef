"""Longer proofs, most of which are commands too."""
