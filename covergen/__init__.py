"""Album covers from the music itself: models, distributed training, sampling and evaluation."""
