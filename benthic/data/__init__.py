"""Documents to token rows: read, filter, deduplicate, shard, load, pack. Pure functions over streams of documents."""
