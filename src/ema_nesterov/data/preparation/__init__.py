"""From text, or the hub, to folders of shards."""
