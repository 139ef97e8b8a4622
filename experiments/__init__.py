"""The scripts: one stage of the recipe a file, run as `python -m experiments.NAME`."""
