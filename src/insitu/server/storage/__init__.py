"""What survives: jobs, tenants and keys in a database, and files under their digests."""
