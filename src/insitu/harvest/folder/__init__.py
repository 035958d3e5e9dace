"""The folder of a harvest as it is written: its lock, its manifest and its shards."""
