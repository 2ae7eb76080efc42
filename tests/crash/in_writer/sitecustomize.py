"""On the import path of children in tests only: lets a writer process die where a test wants it to."""

import os
import sys

if "CKPTMGR_TEST_IN_WRITER" in os.environ and "ckptmgr.writers.worker" in sys.orig_argv:
    import child_process

    child_process.arm_writer()
