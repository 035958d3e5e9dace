"""How experiments run, on any module."""
