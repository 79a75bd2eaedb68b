"""The processes of a run on one machine: which of them speaks for all, and none waits for one that has ended."""

import os
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning.fabric.plugins.environments import ClusterEnvironment

_FIRST = "VISIONATTN_FIRST_PROCESS"
"""Environment variable with the id of the process that Lightning has start the others of a run."""


def is_child() -> bool:
    """Whether another process of the run on this machine started this one, and speaks for it."""
    return int(os.environ.get("LOCAL_RANK", 0)) > 0 or int(os.environ.get("NODE_RANK", 0)) > 0


class Voice:
    """Lets one process of a run on this machine say what has happened when others are lost.

    The first process leaves a file, and who can remove it may speak. As long as the process that started the others
    lives it speaks for them; when it has ended, the first of the others to notice does.

    Args:
        environment: Tells which process this is, and over which port those of the run talk.
    """

    def __init__(self, environment: "ClusterEnvironment") -> None:
        self.first = environment.local_rank() == 0
        self.token = Path(tempfile.gettempdir(), f"visionattn-{os.getuid()}-{environment.main_port}")
        if self.first:
            os.environ[_FIRST] = str(os.getpid())  # those that are started now inherit it
            self.token.touch(0o600)
        self.parent = None if self.first else os.environ.get(_FIRST)

    @property
    def orphaned(self) -> bool:
        """Whether the first process, which started this one, has ended."""
        return self.parent is not None and str(os.getppid()) != self.parent

    def claim(self, patience: float = 2.0) -> bool:
        """Whether this process is to speak; once, of all processes, the answer is yes.

        Args:
            patience: Seconds in which the first process, if it is what was lost, may still be seen.
        """
        end = time.monotonic() + patience
        while self.parent is not None and not self.orphaned:
            if time.monotonic() > end:
                return False
            time.sleep(0.05)
        try:
            self.token.unlink()
        except OSError:
            return False
        return True

    def close(self) -> None:
        """Remove the file, which the end of the first process makes useless."""
        if self.first:
            self.token.unlink(missing_ok=True)

    def watch(self, then: Callable[[], None], grace: float = 10.0) -> None:
        """Call ``then`` in a thread if this process still runs some time after the one that started it has ended.

        Args:
            then: What ends this process, which waits for the other one.
            grace: Seconds that it has to notice by itself.
        """

        def wait() -> None:
            while not self.orphaned:
                time.sleep(0.5)
            time.sleep(grace)
            then()

        if self.parent is not None:
            threading.Thread(target=wait, name="watch over the first process", daemon=True).start()
