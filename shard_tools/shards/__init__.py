"""Bytes of tar shards and of their index, and how packing makes them."""
