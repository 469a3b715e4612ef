"""From folders, zips and music to WebDataset shards with an index, and back."""

__version__ = "0.1.0"
