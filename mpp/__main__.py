import os
import sys

if __name__ == "__main__":
    # `python -m` puts the current folder first, where a `torch.py` among a user's images would be run.
    if sys.path[0] in ("", os.getcwd()):
        del sys.path[0]
    from mpp.cli import main

    main()
