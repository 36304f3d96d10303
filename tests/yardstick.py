"""How fast this machine is just now: limits on processor time are multiples of it, since machines differ twofold and
more."""
import os
import subprocess
import sys


def import_seconds() -> float:
    """Processor seconds of a fresh process that imports what running an experiment needs."""
    before = os.times()
    subprocess.run([sys.executable, "-c", "import lire_nb.lab.runner"], check=True)
    return sum(os.times()[2:4]) - sum(before[2:4])
