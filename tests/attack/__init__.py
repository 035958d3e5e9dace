"""Jobs that were made to do harm: what they must not do, on the way in that a server has."""
