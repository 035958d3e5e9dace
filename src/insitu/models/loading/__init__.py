"""How a model comes into memory: from a repository, a folder, or as a module that is there."""
