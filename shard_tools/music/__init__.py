"""A music library: its files, tags, albums and covers."""
