"""Evaluate a checkpoint: `python evaluate.py run=<folder>`; `python evaluate.py --help` shows what can be changed."""

import os

# Before torch is imported: waiting OpenMP threads must sleep, or contended cores run at a tenth of their speed.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")

from csm.cli.evaluate import main

if __name__ == "__main__":
    main()
