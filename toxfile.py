"""The environment `tests` takes the newest Python that is found: tox with uv tries only the first of a list."""

from __future__ import annotations

import subprocess

from tox.config.loader.memory import MemoryLoader
from tox.config.sets import EnvConfigSet
from tox.plugin import impl
from tox.session.state import State


def runs(python: str) -> bool:
    """Whether there is such a command, and it starts: a version manager's stand-in may not."""
    try:
        return subprocess.run([python, "-c", ""], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


@impl
def tox_add_env_config(env_conf: EnvConfigSet, state: State) -> None:
    """Sets base_python of `tests`, where one of these is found."""
    if env_conf.env_name == "tests":
        newest = next((p for p in ("python3.13", "python3.12", "python3.11", "python3.10") if runs(p)), None)
        if newest:
            env_conf.loaders.insert(0, MemoryLoader(base_python=[newest]))
