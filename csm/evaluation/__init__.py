"""How good a checkpoint is: suites of held-out lines, judges, metrics with intervals, and the report."""
