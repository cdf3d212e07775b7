"""The folders of runs that plot.py and report.py are given as arguments: whether they are runs, and their names."""

import sys


def are_runs(folders, usage):
    """Whether there are folders and each holds a metrics.jsonl. Prints the usage, or what is missing, if not."""
    if not folders:
        print(usage, file=sys.stderr)
        return False
    missing = [str(folder) for folder in folders if not (folder / "metrics.jsonl").exists()]
    if missing:
        print(f"error: there is no metrics.jsonl in {', '.join(missing)}", file=sys.stderr)
    return not missing


def run_names(folders):
    """The names of the folders, or their paths where two have the same name."""
    names = [folder.resolve().name for folder in folders]
    return [str(folder) if names.count(name) > 1 else name for name, folder in zip(names, folders)]
