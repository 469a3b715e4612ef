"""Training: the engine, what surrounds a step, and what is measured and shown meanwhile."""
