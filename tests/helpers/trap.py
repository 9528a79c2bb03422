"""An object that shows whether a file was unpickled by an ordinary unpickler."""

import os
from pathlib import Path


class Trap:
    """Makes the folder `marker` when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.marker),)
