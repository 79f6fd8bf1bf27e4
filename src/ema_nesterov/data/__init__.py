"""Token shards, the batches that are read from them, and the embedded text."""
