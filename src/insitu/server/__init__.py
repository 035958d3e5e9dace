"""A server on which many users share a model: `insitu serve`, and `insitu.serve(...)` in Python."""
