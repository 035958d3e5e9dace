"""Whether the server that has a model's files can be reached, asked once.

The Hub's client asks again several times for each file if a server does not answer, which takes a
minute and a half for a wrong id without a network. Here one question is asked before. If there is
no answer, only files that are on this machine are used.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_SECONDS = 10.0  # as the Hub's client waits


def without_server(place: str, where: Mapping[str, Any]) -> str | None:
    """Returns why the server that has a repository cannot be reached, None if it can.

    None too where no server is needed: for a folder, and where only local files are wanted.

    Args:
        place: the folder or repository.
        where: arguments of `from_pretrained` that say where files are.
    """
    from huggingface_hub import constants, get_session

    offline = constants.HF_HUB_OFFLINE or where.get("local_files_only")
    if offline or os.environ.get("TRANSFORMERS_OFFLINE") or Path(place).exists():
        return None
    server = constants.ENDPOINT
    session: Any = get_session()
    options: dict[str, Any] = {"timeout": _SECONDS}
    if type(session).__module__.startswith("requests"):  # until version 1 of the client
        options.update(allow_redirects=False, proxies=where.get("proxies"))
    else:
        options["follow_redirects"] = False
    try:
        session.head(server, **options)  # any answer will do, also that there is no such page
    except Exception as error:  # its type depends on the version of the client
        return f"{server} does not answer ({str(error) or type(error).__name__})."
    return None
