"""Evaluate a checkpoint: `python evaluate.py run=<folder>`; `python evaluate.py --help` shows what can be changed."""

from csm.cli.evaluate import main

if __name__ == "__main__":
    main()
