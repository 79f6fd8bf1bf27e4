"""Token shards and streams of text, and the batches that are read from them."""
