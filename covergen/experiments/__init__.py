"""Plans of several trainings and evaluations."""
