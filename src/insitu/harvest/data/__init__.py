"""The data of a harvest: documents, tokens, sequences, and the ranges that become shards."""
