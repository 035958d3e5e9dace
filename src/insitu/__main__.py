"""The command line, as `python -m insitu`."""

from __future__ import annotations

from insitu.cli import app

if __name__ == "__main__":
    app(prog_name="insitu")
