"""What judges a run: features, scores and readings of covers in, numbers with their uncertainty out."""

