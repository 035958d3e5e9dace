"""Every type of model that Transformers has, and what standard names mean on it.

`models.py` builds a small model of a type, `plain.py` notes what plain hooks see in a forward of
it, and `judge.py` compares each standard name with that. Nothing here asks the library where a
part of a model is.
"""
