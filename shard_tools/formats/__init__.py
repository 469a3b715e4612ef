"""How bytes and folders mean something: layouts, safe decoding, the shard index."""
