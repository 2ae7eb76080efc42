"""``python -m ckptmgr`` is the ``ckptmgr`` command."""

import sys

from ckptmgr.cli import main

if __name__ == "__main__":
    sys.exit(main())
