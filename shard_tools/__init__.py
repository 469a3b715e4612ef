"""From folders, zips and music to WebDataset shards with an index, and back."""
