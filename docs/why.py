"""Where the small worlds' dialogues are won and lost: questions (was everything asked?) and answers (was it used?).

    PYTHONPATH=. python docs/why.py runs/table/seed*              # top-p 0.9; one line a method, means over the runs
    PYTHONPATH=. python docs/why.py --frontend runs/table/seed*   # the same for pages

known: dialogues in which the human had named all steps before the answer. right: right answers among those. Wrong
answers in spite of knowing all: with an extra step, a missing one, or a wrong value (an answer can have several).

Pages: similarity of the first draft and of the final page; wrong slots of the final page, a dialogue: of those told by
the human or the request, of the topic's house style and never told, of the rest; broken: final pages of other markup.
"""
import sys
from collections import Counter, defaultdict
from pathlib import Path

from machinery.files import read_jsonl
from worlds import frontend
from worlds.backend import known_steps, read_function
from worlds.browser import Browser

BROWSER = Browser()


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


def count_slots(record, counts):
    """Add one dialogue about a page to counts."""
    wish, dialogue = record["task"]["ground_truth"], record["dialogue_history"]
    values, final = frontend.read_page(wish), frontend.read_page(frontend.page_source(record["answer"] or ""))
    style = next(s for topic, s in frontend.HOUSE_STYLES.items() if f" {topic}." in dialogue[0]["content"])
    counts["all"] += 1
    counts["final page"] += 100 * record["reward"]
    counts["first draft"] += 100 * frontend.PageGrader(BROWSER)([dialogue[1]["content"]], [frontend.Task("", wish)])[0]
    known = frontend.known_values(dialogue)
    for slot, value in enumerate(values) if final else ():
        kind = "told" if slot in known else "house" if style.get(slot) == value else "rest"
        counts[kind] += 1
        counts[f"{kind} wrong"] += final[slot] != value
    counts["broken"] += not final


def pages(folders):
    table = defaultdict(Counter)
    for folder in folders:
        for file in (Path(folder) / "eval.jsonl", *sorted(Path(folder).glob("*/eval.jsonl"))):
            for _, record in read_jsonl(file) if file.exists() else ():
                if record["top_p"] != 1.0:
                    count_slots(record, table[record["method"]])
    print("| method | dialogues | first draft | final page | wrong: told | house style | the rest | broken % |\n"
          "| --- | --- | --- | --- | --- | --- | --- | --- |")
    for method, counts in table.items():
        means = {key: value / counts["all"] for key, value in counts.items()}
        wrong = " | ".join(f"{means[f'{k} wrong']:.2f} of {means[k]:.2f}" for k in ("told", "house", "rest"))
        print(f"| {method} | {counts['all']} | {means['first draft']:.1f} | {means['final page']:.1f} | {wrong} "
              f"| {100 * means.get('broken', 0):.1f} |")


def main(folders):
    table = defaultdict(list)
    for folder in folders:
        runs = defaultdict(Counter)
        for file in (Path(folder) / "eval.jsonl", *sorted(Path(folder).glob("*/eval.jsonl"))):
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
    (pages if "--frontend" in sys.argv else main)([name for name in sys.argv[1:] if name != "--frontend"])
