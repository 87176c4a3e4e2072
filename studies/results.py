"""From the files of runs to figures with intervals: what the report and all studies share.

A method is evaluated on the same held-out tasks as all others of its run, so its success can be compared dialogue by
dialogue: `summarise` redraws runs and tasks once for all methods (machinery/bootstrap.py), and a difference of two is
taken on the same redrawn ones. A critic is checked by the stage `credit`; `credit_cells` gives means and ranges over
runs.

Place in the data flow: eval.jsonl and credit.json of one or of several runs -> report.py and studies/study.py.
Exercised by `python -m pytest tests/test_report.py tests/test_study.py`.

Shapes: R resamples, N task results of all runs.
"""
import numpy as np

from machinery.bootstrap import resample_weights
from machinery.files import InputError, read_json
from machinery.folder import further_critics
from machinery.schema import evaluation, fold, read_records
from studies.critics import KNOWN_CRITICS, title_of

METHODS = ("base", "RFT", "multi-turn DPO", "SWEET")  # and then SWEET with further critics
CREDIT = (
    ("question", "auc", "states"),
    ("answer", "auc", "states"),
    ("across", "auc", "states"),
    ("monte_carlo", "accuracy", "pairs"),
)


def number(value, digits=1, sign=""):
    """A number as text: "-" where there is none, and never a negative zero."""
    if value is None or not np.isfinite(value):
        return "-"
    return f"{round(float(value), digits) + 0.0:{sign}.{digits}f}"


def bracketed(found, sign=""):
    """Mean, low and high as text."""
    mean, low, high = (number(value, 1, sign) for value in found)
    return f"{mean} [{low}, {high}]"


def decoding(top_p):
    return "T=1" if top_p == 1 else f"top-p {top_p:g}"


def critics_of(root):
    """{what tables call SWEET with a critic: the folder of what depends on it}, the run's own first."""
    known, further = list(KNOWN_CRITICS), further_critics(root)
    order = sorted(further, key=lambda kind: known.index(kind) if kind in known else len(known))
    return {"SWEET": root, **{title_of(kind): further[kind] for kind in order}}


def evaluations(root):
    """The evaluated dialogues of a run: {(method, top_p): records in the order of the tasks}, which all share."""
    found = {}
    for file in (folder / "eval.jsonl" for folder in critics_of(root).values()):
        for _, record in read_records(file, evaluation()) if file.exists() else ():
            record["dialogue_history"] = fold(record["dialogue_history"])
            found.setdefault((record["method"], record["top_p"]), []).append(record)
    tasks = {key: [record["task"] for record in records] for key, records in found.items()}
    if any(tasks[key] != next(iter(tasks.values())) for key in tasks):
        raise InputError(
            f"{root}: eval.jsonl holds different tasks for different methods; run the stage eval again"
        )
    return found


def summarise(found, world):
    """{(method, top_p): 1 + R rows (the world's two figures in %, turns)}, and the number of tasks of each run.

    found: `evaluations` of each run. Runs without any are left out; a method counts when all others have it.
    """
    found = [evaluated for evaluated in found if evaluated]
    sizes = [len(next(iter(evaluated.values()))) for evaluated in found]
    if not found:
        return {}, sizes
    weights_RN, means = resample_weights(sizes), {}
    ways = sorted({top_p for evaluated in found for _, top_p in evaluated}, reverse=True)
    methods = dict.fromkeys([*METHODS, *(method for evaluated in found for method, _ in evaluated)])
    for key in [(method, top_p) for method in methods for top_p in ways]:
        if not all(key in evaluated for evaluated in found):
            continue
        rows = []
        for evaluated in found:
            records = evaluated[key]
            for record, base in zip(records, evaluated.get(("base", key[1]), records)):
                rows.append(
                    [*world.figures(record, base), len(record["dialogue_history"]) // 2]
                )
        means[key] = weights_RN @ np.array(rows)
    return means, sizes


def credits_of(runs):
    """{what tables call SWEET with a critic: credit.json of each run that has one}."""
    found = {}
    for root in runs:
        for label, folder in critics_of(root).items():
            if credit := read_json(folder / "credit.json", {}):
                found.setdefault(label, []).append(credit)
    return found


def credit_cells(credits):
    """How often a critic is right, as texts: the mean over runs, the range, the number of states or pairs."""
    cells = []
    for kind, value, count in CREDIT:
        scores = [
            credit[kind][value]
            for credit in credits
            if credit.get(kind, {}).get(value) is not None
        ]
        total = f"{sum(credit.get(kind, {}).get(count, 0) for credit in credits)} {count}"
        spread = f"{min(scores):.2f} to {max(scores):.2f}, " if len(scores) > 1 else ""
        cells.append(f"{np.mean(scores):.2f} ({spread}{total})" if scores else "-")
    return cells


def markdown(caption, header, rows):
    """A table and what is said under it, padded so that it reads well in a terminal too."""
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    lines = [header, ["-" * width for width in widths], *rows]
    text = ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines]
    return "\n".join([*text, "", caption])
