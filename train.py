"""Train a CSM: `python train.py` learns to speak from nothing, `python train.py --help` shows what can be changed."""

from csm.cli.train import main

if __name__ == "__main__":
    main()
