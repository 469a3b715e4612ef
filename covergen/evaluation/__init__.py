"""What judges a run: songs, covers made for them, and figures with their uncertainty."""
