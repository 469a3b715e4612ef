"""Raw data sets: what their folders and files mean."""
