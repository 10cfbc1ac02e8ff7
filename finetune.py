"""Fine-tune a checkpoint: `python finetune.py base=<checkpoint> data=<recordings>`; `--help` shows what can be changed."""

from csm.cli.finetune import main

if __name__ == "__main__":
    main()
