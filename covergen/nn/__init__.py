"""Pure torch: layers, losses, augmentation and schedules."""
