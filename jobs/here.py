"""What lies in the folder that a command is given in is not taken for a module of ours, of a library's, or of Python's.

Nothing is imported here but what Python has loaded by itself: the name of anything else may be that of a user's file.
"""

import os
import sys


def import_nothing_from_here() -> None:
    """Leave the working directory out of sys.path, where `python -m`, and an empty entry of PYTHONPATH, put it. A
    checkout that is worked in stays. Raises FileNotFoundError where it has been deleted.
    """
    home = os.path.dirname(os.path.dirname(os.path.realpath(sys.modules["dailies"].__file__ or "")))     # dailies.HOME
    here = os.path.realpath(os.curdir)
    if here != home:
        sys.path[:] = [path for path in sys.path if path and os.path.realpath(path) != here]
