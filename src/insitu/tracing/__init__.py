"""How it is written: handles, blocks and invocations."""
