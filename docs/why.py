"""Where the small world's dialogues are won and lost: questions (was everything asked?) and answers (was it used?).

    PYTHONPATH=. python docs/why.py runs/table/seed*      # top-p 0.9; one line a method, means over the runs

known: dialogues in which the human had named all steps before the answer. right: right answers among those. Wrong
answers in spite of knowing all: with an extra step, a missing one, or a wrong value (an answer can have several).
"""
import sys
from collections import Counter, defaultdict
from pathlib import Path

from env import read_jsonl
from worlds.backend import known_steps, read_function


def count(record, counts):
    """Add one dialogue to counts."""
    wanted = read_function(record["task"]["ground_truth"])
    known = known_steps(record["dialogue_history"])
    given = read_function(record["answer"] or "")
    counts["all"] += 1
    if known != wanted:
        counts["lucky"] += record["reward"] == 1.0
        return
    counts["known"] += 1
    counts["right"] += record["reward"] == 1.0
    if record["reward"] < 1.0:
        counts["extra"] += bool(given.keys() - wanted.keys())
        counts["missing"] += bool(wanted.keys() - given.keys())
        counts["value"] += any(given[step] != wanted[step] for step in given.keys() & wanted.keys())


def main(folders):
    table = defaultdict(list)
    for folder in folders:
        runs = defaultdict(Counter)
        for file in (Path(folder) / "eval.jsonl", Path(folder) / "no-reference" / "eval.jsonl"):
            for _, record in read_jsonl(file) if file.exists() else ():
                if record["top_p"] != 1.0:
                    count(record, runs[record["method"]])
        for method, counts in runs.items():
            table[method].append(counts)
    print("| method | runs | known % | right % of known (by run) | errors: extra, missing, wrong value "
          "| right % of not known |\n| --- | --- | --- | --- | --- | --- |")
    for method, runs in table.items():
        total = sum(runs, Counter())
        by_run = ", ".join(f"{100 * r['right'] / max(1, r['known']):.0f}" for r in runs)
        print(f"| {method} | {len(runs)} | {100 * total['known'] / total['all']:.1f} "
              f"| {100 * total['right'] / max(1, total['known']):.1f} ({by_run}) "
              f"| {total['extra']}, {total['missing']}, {total['value']} "
              f"| {100 * total['lucky'] / max(1, total['all'] - total['known']):.1f} |")


if __name__ == "__main__":
    main(sys.argv[1:])
