"""Studies: the paper's ablations and curves over several seeds, one command each.

    python sweet.py study critics     every critic on the same candidates, and the actor that comes of each (Table 3)
    python sweet.py study best-of-n   the best of N candidates at each turn, by each critic, no actor (Figure 3a)
    python sweet.py study data        success against the number of offline dialogues (Figure 3b)
    python sweet.py study rounds      SWEET again, from its own actor (not in the paper)

A study is a list of runs of `python sweet.py`, some of them side by side, and a table of what they left. It writes
RUN/study.md (the table), RUN/study.json (its figures) and RUN/study.svg; the runs lie in RUN/seedN and beside it, and
`python sweet.py status --run RUN` says what there is. The same command goes on after a stop, and ends in the same
files.

All methods, sizes and rounds of a seed share its held-out tasks and, but for the rounds, its base policy. So intervals
are taken as in the report: runs and tasks are drawn anew, once for all that is compared.

Place in the data flow: eval.jsonl, credit.json and best-of-n.jsonl of all runs -> one table and one figure. Exercised
by `python -m pytest tests/test_study.py`. Differences from the paper: sizes, seeds and intervals.
"""
from dataclasses import dataclass
from fractions import Fraction

from machinery import charts
from machinery.bootstrap import interval
from machinery.files import InputError, put_text, read_json, write_json
from machinery.provenance import provenance
from machinery.train import arg
from studies import best_of_n
from studies.critics import KNOWN_CRITICS, find_critic, title_of
from studies.results import METHODS, bracketed, credit_cells, credits_of, decoding
from studies.results import evaluations, markdown, summarise

NAMES = ("critics", "best-of-n", "data", "rounds")
FIGURE_3A = ("without-c", "untrained", "value", "judge", "oracle")  # the paper's critics there, and the bounds


@dataclass(frozen=True)
class Study:
    """What the studies vary; seeds and jobs are the table's."""
    critics: str = ""
    """Critics beside SWEET's: KIND[,KIND]; '': all that apply (best-of-n: Figure 3a's; data: untrained)."""
    sizes: str = "1/16,1/8,1/4,1/2,1"
    """Shares of the dialogues (study data)."""
    rounds: int = arg(3, most=9)
    """Rounds of SWEET (study rounds)."""


# ------------------------------------------------------------------ runs

def critics_of_study(run, default):
    """The kinds of critics that are named, or else `default`. InputError where there is no such critic."""
    named = [kind for kind in run.settings["study"].critics.split(",") if kind]
    for kind in named:
        find_critic(kind, "--study-critics")
    return named or default


def all_that_apply(run):
    """All but the run's own, the judge where there is no model that can be asked, and the oracle where the tasks are
    not the world's."""
    left_out = {run.settings["critic"].kind}
    if not run.given.model:
        left_out.add("judge")
    if run.given.tasks:
        left_out.add("oracle")
    return [kind for kind in KNOWN_CRITICS if kind not in left_out]


def with_critics(name, words, critics):
    """{what a run is called: its words}: the run itself, and then each further critic on what it shares."""
    found = {name: words}
    for kind in critics:
        found[f"{name}, {kind}"] = [*words, f"--critic={kind}"]
    return found


def of_seed(run, seed, name=""):
    """The words of the run of one seed."""
    return [f"--run={run.root / f'seed{seed}{name}'}", f"--seed={seed}"]


def shares(run):
    """The sizes of the study, the largest first."""
    text = run.settings["study"].sizes
    try:
        found = {Fraction(part) for part in text.split(",")}
    except (ValueError, ZeroDivisionError):
        found = set()
    if len(found) < 2 or min(found) <= 0:
        raise InputError(f"--study-sizes {text}: expected two or more shares above 0, as in 1/16,1/4,1")
    return sorted(found, reverse=True)


def name_of(share):
    return f"-size{share}".replace("/", "of")


def sized(run, seed, share, first):
    """The words of the run that has this share of the dialogues, from the base policy of the first one."""
    cfg = run.settings["rollout"]
    tasks = len(run.training_tasks()) if run.given.tasks else cfg.tasks
    whole = {
        "--rollout-tasks": tasks,
        "--rollout-dialogues": cfg.dialogues,
        "--candidates-states": run.settings["candidates"].states,
    }
    words = ["eval", *of_seed(run, seed, name_of(share))]  # without the stage credit, which takes as long as an actor
    words += [f"{flag}={max(2, round(n * share))}" for flag, n in whole.items() if n]
    if share != first and not run.initial:
        base = run.root / f"seed{seed}{name_of(first)}/base"
        words += [f"--model={base}", "--base-documents=0"]
    return words


def round_name(number):
    return "" if number == 1 else f"-round{number}"


def chain_of(run, name, seed):
    """The runs of one seed, in their order: {what a run is called: its words}."""
    title, words = f"seed {seed}", of_seed(run, seed)
    if name == "critics":
        return with_critics(title, words, critics_of_study(run, all_that_apply(run)))
    if name == "best-of-n":
        critics = [kind for kind in all_that_apply(run) if kind in FIGURE_3A]
        chain = with_critics(title, words, critics_of_study(run, critics))
        return {title: ["best-of-n", *words] for title, words in chain.items()}
    found = {}
    if name == "data":
        sizes = shares(run)
        for share in sizes:
            words = sized(run, seed, share, sizes[0])
            found |= with_critics(f"{title}, {share}", words, critics_of_study(run, ["untrained"]))
        return found
    for number in range(1, run.settings["study"].rounds + 1):
        words = ["eval", *of_seed(run, seed, round_name(number))]
        if number > 1:
            before = run.root / f"seed{seed}{round_name(number - 1)}"
            words += [f"--model={before / 'actor'}", "--base-documents=0",
                      f"--rollout-seed={1000 * (number - 1) + seed + 1}"]
        found[f"{title}, round {number}"] = words
    return found


def check(run, name):
    """InputError where a study cannot begin."""
    made = read_json(run.root / "study.json", {}).get("study", name)
    if made != name:
        raise InputError(f"{run.root}: holds the study {made}; take another --run")
    if run.given.trajectories and name in ("data", "rounds"):
        raise InputError(f"--trajectories: study {name} rolls out dialogues of its own")
    if run.given.candidates and name in ("data", "rounds"):
        raise InputError(f"--candidates: study {name} samples candidates of its own")
    methods = run.settings["eval"]
    if name != "best-of-n" and not {"base", "actor"} <= set(methods.names):
        raise InputError(f"--eval-methods {methods.methods}: expected base and actor among them: study {name} compares "
                         "them")


def chains(run, name, seeds):
    """{seed's name: its runs}."""
    check(run, name)
    return {f"seed{seed}": chain_of(run, name, seed) for seed in seeds}


# ------------------------------------------------------------------ tables

def gathered(run, seeds, names):
    """`summarise` over runs of one seed in several folders: {((label, method), top_p): 1 + R rows}, and the number of
    tasks of each seed. names: {label: what a folder is called behind the seed}."""
    found = []
    for seed in seeds:
        merged = {}
        for label, name in names.items():
            evaluated = evaluations(run.root / f"seed{seed}{name}")
            if not evaluated:
                raise InputError(f"{run.root / f'seed{seed}{name}'}: eval.jsonl is missing")
            for (method, top_p), records in evaluated.items():
                merged[(label, method), top_p] = records
                if method == "base":
                    merged.setdefault(("base", top_p), records)  # what pages are compared with
        tasks = {str([record["task"] for record in records]) for records in merged.values()}
        if len(tasks) > 1:
            raise InputError(f"{run.root}: the runs of seed {seed} were evaluated on different tasks")
        found.append(merged)
    return summarise(found, run.world)


def leads_of(means, subject, other, ways):
    """The intervals of what one has more than another, on the same draws."""
    return [interval((means[subject, way] - means[other, way])[:, 0]) for way in ways]


def success_of(means, key, ways):
    return [interval(means[key, way][:, 0]) for way in ways]


def figure(row, column, found):
    """A mean with its interval, as study.json has it."""
    mean, low, high = (round(float(value), 4) for value in found)
    return {"row": row, "column": column, "mean": mean, "low": low, "high": high}


def caption_of(run, sizes, what):
    return (f"{what} n = {' + '.join(map(str, sizes))} held-out tasks, seeds: {len(sizes)}. Brackets: 95 % intervals, "
            "bootstrap over seeds and their tasks; differences on the same draws.")


def critics_table(run, seeds, quality):
    """Rows: each critic and what comes of it; SWEET's own first."""
    means, sizes = gathered(run, seeds, {"": ""})
    ways = sorted({top_p for _, top_p in means}, reverse=True)
    methods = [key[1] for key in dict.fromkeys(key for key, _ in means) if key != "base"]
    credits = credits_of([run.root / f"seed{seed}" for seed in seeds])
    rows, figures, bars = [], [], {}
    for method in methods:
        if method in METHODS[:3]:
            cells = ["-"] * 4
        else:
            cells = credit_cells(credits.get(method, []))
        found = success_of(means, ("", method), ways)
        bars[method] = found, paper_figure(run, method)
        lead = leads_of(means, ("", method), ("", "SWEET"), ways)
        cells += map(bracketed, found)
        cells += ["-" if method == "SWEET" else bracketed(gap, "+") for gap in lead]
        rows.append([method, *cells, run.world.PAPER.get(method, "-")])
        for way, success, gap in zip(ways, found, lead):
            figures.append(figure(method, f"{quality}, {decoding(way)}", success))
            figures.append(figure(method, f"less SWEET, {decoding(way)}", gap))
    decoded = [decoding(way) for way in ways]
    header = ["ranked by", "AUC, questions", "AUC, answers", "AUC, across kinds", "agrees with Monte Carlo"]
    header += [f"{quality} %, {way}" for way in decoded] + [f"less SWEET, {way}" for way in decoded] + ["paper"]
    caption = caption_of(run, sizes, "Each critic on the same candidates, and the actor trained on its pairs. AUC and "
                         "agreement: mean over seeds, range.")
    chart = charts.intervals(f"{quality} by critic", bars, decoded, f"{quality}, %", "paper (8B)")
    return [(caption, header, rows)], figures, chart


def paper_figure(run, method):
    text = run.world.PAPER.get(method, "-")
    return None if text == "-" else float(text)


def data_table(run, seeds, quality):
    """Rows: methods; columns: sizes; a table for each way of decoding."""
    names = {share: name_of(share) for share in reversed(shares(run))}
    means, sizes = gathered(run, seeds, names)
    ways = sorted({top_p for _, top_p in means}, reverse=True)
    methods = dict.fromkeys(key[1] for key, _ in means if key != "base")
    numbers = [dialogues_of(run, seeds[0], name) for name in names.values()]
    columns = [f"{number} dialogues" for number in numbers]
    tables, figures, lines = [], [], {}
    for way in ways:
        rows = {}
        for method in methods:
            rows[method] = [success_of(means, (share, method), [way])[0] for share in names]
            lines[method] = numbers, rows[method]
        for method in methods:
            if method not in ("SWEET", "base"):
                rows[f"SWEET - {method}"] = [
                    leads_of(means, (share, "SWEET"), (share, method), [way])[0] for share in names]
        for label, found in rows.items():
            for column, one in zip(columns, found):
                figures.append(figure(label, f"{column}, {decoding(way)}", one))
        caption = caption_of(run, sizes, "Against offline dialogues; one base policy a seed, states in proportion.")
        texts = [[label, *(bracketed(one, "+" * (" - " in label)) for one in found)] for label, found in rows.items()]
        tables.append((caption, [f"{quality} %, {decoding(way)}", *columns], texts))
    chart = charts.growth(f"{quality} by offline dialogues", lines, "offline dialogues",
                          f"{quality}, %, {decoding(ways[-1])}")
    return tables, figures, chart


def dialogues_of(run, seed, name):
    """How many offline dialogues a run has."""
    with open(run.root / f"seed{seed}{name}" / "trajectories.jsonl", "rb") as file:
        return sum(1 for _ in file)


def rounds_table(run, seeds, quality):
    """Rows: each method of each round, which starts from the SWEET actor of the round before."""
    numbers = range(1, run.settings["study"].rounds + 1)
    means, sizes = gathered(run, seeds, {number: round_name(number) for number in numbers})
    ways = sorted({top_p for _, top_p in means}, reverse=True)
    keys = [("base policy", (1, "base"))]
    for number in numbers:
        keys += [(f"round {number}: {method}", (number, method)) for method in METHODS[1:]
                 if ((number, method), ways[0]) in means]
    rows, figures, bars = [], [], {}
    for label, key in keys:
        start = key[0], "base"
        found, lead = success_of(means, key, ways), leads_of(means, key, start, ways)
        gaps = ["-" if key == start else bracketed(gap, "+") for gap in lead]
        rows.append([label, *map(bracketed, found), *gaps])
        bars[label] = found, None
        for way, success, gap in zip(ways, found, lead):
            figures.append(figure(label, f"{quality}, {decoding(way)}", success))
            figures.append(figure(label, f"gain of the round, {decoding(way)}", gap))
    decoded = [decoding(way) for way in ways]
    header = ["policy", *(f"{quality} %, {way}" for way in decoded), *(f"gain of the round, {way}" for way in decoded)]
    caption = caption_of(run, sizes, "All methods of a round start from SWEET's actor of the round before, on fresh "
                         "dialogues.")
    chart = charts.intervals(f"{quality} by round", bars, decoded, f"{quality}, %", "")
    return [(caption, header, rows)], figures, chart


def best_table(run, seeds, quality, open_run):
    """Rows: critics; columns: N."""
    chains = [chain_of(run, "best-of-n", seed) for seed in seeds]
    runs = [open_run(words) for chain in chains for words in chain.values()]
    found, rows, figures, lines = best_of_n.means(runs), [], [], {}
    numbers = best_of_n.NUMBERS
    columns = [f"N = {n}" for n in numbers] + [f"{numbers[-1]} less {numbers[0]}"]
    for kind, intervals in found.items():
        label = "SWEET" if kind == run.settings["critic"].kind else title_of(kind)
        *by_number, gain = intervals
        rows.append([label, *map(bracketed, by_number), bracketed(gain, "+")])
        figures += [figure(label, column, one) for column, one in zip(columns, intervals)]
        lines[label] = numbers, by_number
    sizes = [len(one.held_out()) for one in runs[:: len(runs) // len(seeds)]]
    caption = caption_of(run, sizes, f"{quality}, %, of the base policy where a critic picks each turn out of N.")
    chart = charts.growth(f"{quality} by candidates a turn", lines, "candidates a turn, N", f"{quality}, %")
    return [(caption, ["picked by", *columns], rows)], figures, chart


def finish(run, name, seeds, open_run):
    """study.md, study.json and study.svg of the runs that are there; returns the text."""
    quality, _ = run.world.headers(run.record.values)
    if name == "best-of-n":
        tables, figures, chart = best_table(run, seeds, quality, open_run)
    else:
        makers = {"critics": critics_table, "data": data_table, "rounds": rounds_table}
        tables, figures, chart = makers[name](run, seeds, quality)
    made = provenance()
    origin = f"`{made['command']}`, commit {made['commit']}, {made['machine']}."
    text = "\n\n".join(markdown(*table) for table in tables) + f"\n\n{origin}\n"
    kept = {key: made[key] for key in ("command", "commit", "machine", "versions")}
    write_json(run.root / "study.json", {"study": name, "seeds": list(seeds), **kept, "figures": figures})
    put_text(run.root / "study.svg", charts.standalone(chart))
    put_text(run.root / "study.md", text)
    return text
