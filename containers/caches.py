"""Caches lie below /cache in the image, or below the home folder where nothing that can be written is mounted there.

apptainer makes all of an image read-only but what is mounted. Every interpreter of the image imports this as it starts.
"""

import os
from pathlib import Path

PLACE = "/cache"


def place() -> None:
    """Change the variables that name a folder which cannot be made; those that the user has set name others."""
    if os.access(PLACE, os.W_OK):
        return
    for name, path in list(os.environ.items()):
        if path == PLACE or path.startswith(PLACE + "/"):
            os.environ[name] = str(Path.home() / ".cache/circuitmill") + path.removeprefix(PLACE)


place()
