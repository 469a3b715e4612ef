"""What training and evaluation read: datasets over shards, and the endless stream of batches."""
