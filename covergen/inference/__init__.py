"""From a trained run to covers: models, audio and cover inputs, image files."""
