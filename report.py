"""The report: what a run learned, as a table for the terminal and the README, and as one HTML page for reading.

Two questions are answered here. *Did it work?* `results_table` compares the methods by success on held-out tasks. Two
things vary from one run to the next, the seed (another base policy, other offline data) and the tasks, so the
intervals come from a two-level bootstrap: draw runs with replacement, then tasks within each drawn run; 95 % of the
redrawn means lie in the interval. A difference of two methods is taken on the same redrawn runs and tasks, which
removes what both share. *What was learned?* `write` shows the candidates of three states in the critic's order, the
critic beside Monte Carlo, and held-out dialogues. A turn there has its share: how much of what the initial policy
itself says at that state the critic finds worse. Raw advantages (Eq. 3) have no meaning across states.

Place in the data flow: the last room. Everything is read from the files of a run, and a file that is not there costs
its section, no more. The page is one file without scripts or network, made from machinery/page/ with charts from
machinery/charts.py; what models wrote is escaped. docs/pictures.py draws the README's. Exercised by `python sweet.py
report`, `python sweet.py table` and `python -m pytest tests/test_report.py`.

Shapes: R resamples, S runs (seeds), N task results of all runs.
"""

import itertools
import json
from collections import Counter
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path

import numpy as np

import actor
import critic
from env import ANSWER_MARKER, Task, action_tokens
from machinery import charts
from machinery.bootstrap import interval
from machinery.files import InputError, clean, note, put_text, read_json
from machinery.folder import remembered
from machinery.schema import fold, read_records, task_key, trajectory
from machinery.train import Machine, load_model
from studies import faults
from studies.credit import label as label_turns
from studies.critics import find_critic
from studies.results import bracketed, credit_cells, credits_of, critics_of, decoding
from studies.results import evaluations, markdown, number, summarise
from worlds import World
from worlds.backend import Backend

SHARED = "rollout samples"  # the stages that SWEET needs after the base policy, whatever the critic
OWN = "critic candidates pairs actor"  # those that each critic has for itself
BASELINES = {"base": "", "RFT": "rollout rft", "multi-turn DPO": "rollout multiturn"}
OFFLINE = "initial policy, offline"  # the "method" of dialogues that were only rolled out
PAGE = Path(__file__).resolve().parent / "machinery" / "page"
SAMPLED = 16  # turns of the initial policy that a turn is compared with
FEW = 30  # held-out tasks: on fewer, percentile intervals promise too much
FULL = 0.3  # nats a token from the middle candidate: from here on a turn has its full colour


def listed(names):
    """Names as a list in a sentence."""
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


# ------------------------------------------------------------------ did it work?


def settings_of(root):
    """{name: value} of everything that the stages of a run were made with, its own critic before others."""
    found = {}
    for folder in reversed(critics_of(root).values()):
        for file in sorted(folder.glob("settings/*.json")):
            found |= read_json(file, {})
    return found


def seconds_of(root, method):
    """Seconds of all stages that a method needs, NaN where one was not timed."""
    shared = read_json(root / "seconds.json", {})
    if method in BASELINES:
        return sum(shared.get(stage, np.nan) for stage in BASELINES[method].split())
    own = read_json(critics_of(root)[method] / "seconds.json", {})
    seconds = [shared.get(stage, np.nan) for stage in SHARED.split()]
    seconds += [own.get(stage, np.nan) for stage in OWN.split()]
    return sum(seconds)


def leads(means, methods, ways):
    """{what SWEET is compared with: [(method, (mean, low, high) of SWEET's lead in points) of each way]}."""
    baselines = [method for method in ("RFT", "multi-turn DPO") if method in methods]
    if "SWEET" not in methods or not baselines:
        return {}
    choices = {method: [method] for method in methods if method != "SWEET"}
    found = {}
    for label, choice in {**choices, "better baseline": baselines}.items():
        best = [max(choice, key=lambda m, p=p: means[m, p][0, 0]) for p in ways]
        gaps = []
        for method, p in zip(best, ways):
            gap_R3 = means["SWEET", p] - means[method, p]
            gaps.append(gap_R3[:, 0])
        found[label] = list(zip(best, map(interval, gaps)))
    return found


def humans_of(made):
    """Who replied in dialogues that were made with these settings, as a sentence; nothing where it is the default."""
    human, held_out = made.get("human") or "scripted", made.get("heldout_human")
    if held_out:
        trained = "" if made.get("trajectories") else f", in the offline dialogues: {human}"
        return f" The human in these dialogues: {held_out}{trained}."
    return "" if human == "scripted" else f" The human: {human}."


def results_caption(runs, means, sizes, ways, figure):
    over = "tasks only, there being one seed" if len(sizes) == 1 else "seeds and their tasks"
    base = np.mean([read_json(root / "seconds.json", {}).get("base", 0) for root in runs])
    caption = (
        f"n = {' + '.join(map(str, sizes))} held-out tasks, seeds: {len(sizes)}. Brackets: 95 % intervals, bootstrap "
        f"over {over}. {figure.capitalize()}, turns: {decoding(ways[-1])}. Seconds: all stages after the base "
        f"policy ({base:.0f})."
    )
    caption += humans_of(settings_of(runs[0]))
    played = read_json(runs[0] / "settings/eval.json", {})
    departures = {"rollout.answer_on_code": "--answer-on-code", "rollout.last_turn_notice": "--last-turn-notice"}
    if on := [flag for name, flag in departures.items() if played.get(name)]:
        caption += f" Not the paper's protocol: {' and '.join(on)}."
    made = read_json(runs[0] / "settings/critic.json", {})
    kind = made.get("critic.kind", "bradley-terry")
    if kind != "bradley-terry":
        caption += f" The row SWEET ranks by another critic than the paper's: {kind}."
    if any(np.ptp(mean_R3[:, 0]) == 0 for mean_R3 in means.values()):
        caption += " A bracket of no width: all of these tasks came out alike; it does not say how others will."
    return caption


def results_tables(runs, world, means, sizes):
    """[(caption, header, rows)] of the results and of SWEET's lead, none where nothing was evaluated. means, sizes: as
    `summarise` returns them."""
    if not means:
        return []
    methods, ways = ([*dict.fromkeys(names)] for names in zip(*means))
    figure, other = world.headers(settings_of(runs[0]))
    decoded = list(map(decoding, ways))
    rows, more = [], []
    for method in methods:
        by_way = [means[method, p] for p in ways]
        _, second, turns = by_way[-1][0]
        seconds = np.mean([seconds_of(root, method) for root in runs])
        cells = [bracketed(interval(mean_R3[:, 0])) for mean_R3 in by_way]
        rows.append(
            [
                method,
                *cells,
                number(second),
                number(turns, 2),
                number(seconds, 0),
                world.PAPER.get(method, "-"),
            ]
        )
        more.append([method, *(bracketed(interval(mean_R3[:, 1])) for mean_R3 in by_way)])
    header = [
        "method",
        *(f"{figure} %, {way}" for way in decoded),
        f"{other} %",
        "turns",
        "seconds",
    ]
    caption = results_caption(runs, means, sizes, ways, other)
    tables = [(caption, [*header, "paper (8B, real ColBench)"], rows)]
    lead = []
    for label, gaps in leads(means, methods, ways).items():
        names = [f" ({method})" if label == "better baseline" else "" for method, _ in gaps]
        lead.append(
            [
                f"SWEET - {label}",
                *(bracketed(gap, "+") + name for (_, gap), name in zip(gaps, names)),
            ]
        )
    if lead:
        tables.append(
            (
                f"Points of {figure}, on the same redrawn seeds and tasks.",
                ["difference", *decoded],
                lead,
            )
        )
    if world.PAIRED:
        tables.append((f"The same, with intervals: {other} %.", [other, *decoded], more))
    return tables


def fault_tables(found):
    """What went wrong (studies/faults.py). found: the evaluations of each run."""
    records = itertools.chain.from_iterable(records for run in found for records in run.values())
    return faults.table(records)


def credit_tables(runs, world):
    """[(caption, header, rows)] of how often each critic is right: mean over runs, range, number of states or pairs."""
    found = credits_of(runs)
    rows = [[label, *credit_cells(credits)] for label, credits in found.items()]
    turn = words_of(world, "question")
    caption = (
        f"AUC: how often a {turn[1]} {turn[0]} (a right answer) has a larger advantage than a {turn[2]} (wrong) one "
        "there; across kinds: a good turn than a bad one of the other kind. Monte Carlo: how often a turn has that "
        "leads to success more often than another. 0.5: guessing, 1: perfect."
    )
    header = [
        "credit, held-out tasks",
        f"AUC, {turn[0]}s",
        "AUC, answers",
        "AUC, across kinds",
        "agrees with Monte Carlo",
    ]
    return [(caption, header, rows)] if rows else []


def words_of(world, kind):
    """(noun, good, bad) for a kind of turn, as the world calls it."""
    return {"question": world.TURN, "answer": ("answer", "right", "wrong")}.get(
        kind, ("turn", "good", "bad")
    )


def results_table(runs, world):
    """The results of one run or of several seeds as Markdown, padded so that it reads well in a terminal too."""
    runs, text = [Path(root) for root in runs], []
    found = [evaluations(root) for root in runs]
    results = results_tables(runs, world, *summarise(found, world))
    for table in results + fault_tables(found) + credit_tables(runs, world):
        text += [markdown(*table), ""]
    return "\n".join(text) or "No results yet: eval.jsonl is made by `python sweet.py eval`.\n"


# ------------------------------------------------------------------ the first screen


def sign_of(lead_R):
    """1 or -1 where the interval of a lead lies on one side of 0; 0 where it does not, or where too few tasks, all
    alike, make one of no width."""
    _, low, high = interval(lead_R)
    return int(np.sign(low)) if low * high > 0 and low < high else 0


def sentences(means, n, figure, order):
    """What the intervals of the differences say, and what they leave open: a list of sentences. n: tasks; order:
    {method: the paper's figure, or None}."""
    methods, ways = ([*dict.fromkeys(names)] for names in zip(*means))
    if n < FEW or len(methods) < 2:
        return [
            f"Too little to say what was found: {len(methods)} methods, {n} held-out tasks."
        ]
    subject = "SWEET" if "SWEET" in methods else methods[-1]
    groups = {}
    for other in methods:
        signs = {
            p: sign_of((means[subject, p] - means[other, p])[:, 0])
            for p in ways
            if other != subject
        }
        for sign in sorted(set(signs.values())):
            where = [decoding(p) for p in ways if signs[p] == sign]
            groups.setdefault((sign, listed(where)), []).append(other)
    openings = {
        1: f"Found: {subject} has more {figure} than",
        -1: f"Found: {subject} has less {figure} than",
        0: f"Not found: a difference between {subject} and",
    }
    text = []
    for sign, opening in openings.items():
        parts = [
            f"{listed(others)} at {where}" for (s, where), others in groups.items() if s == sign
        ]
        if parts:
            text.append(f"{opening} {'; '.join(parts)}.")
    return text + paper_order(
        means, ways[-1], [method for method in methods if order.get(method)], order
    )


def paper_order(means, way, methods, order):
    """How many of the paper's comparisons hold here, as a sentence (in a list; none where there are too few)."""
    methods = sorted(methods, key=lambda method: -order[method])
    signs = {}
    for i, better in enumerate(methods):
        for worse in methods[i + 1 :]:
            sign = sign_of((means[better, way] - means[worse, way])[:, 0])
            signs.setdefault(sign, []).append(f"{better} > {worse}")
    count = sum(map(len, signs.values()))
    if count < 2:
        return []
    text = f"Of the paper's order, {' > '.join(methods)}, {len(signs.get(1, []))} of {count} comparisons hold here"
    text += f"; open: {', '.join(signs[0])}" if 0 in signs else ""
    text += f"; the other way round: {', '.join(signs[-1])}" if -1 in signs else ""
    return [f"{text} ({decoding(way)})."]


def paper_figures(world):
    """{method: the paper's figure, None where it gives none}."""
    return {
        method: float(text) if text[:1].isdigit() else None
        for method, text in world.PAPER.items()
    }


def first_screen(run, found):
    """The sentences, the picture and the tables of the results; nothing where no method was evaluated. found: the
    run's evaluations."""
    means, sizes = summarise([found], run.world)
    if not means:
        return {}
    methods, ways = ([*dict.fromkeys(names)] for names in zip(*means))
    figure, order = run.world.headers(run.settings)[0], paper_figures(run.world)
    rows = {}
    for method in methods:
        intervals = [interval(means[method, p][:, 0]) for p in ways]
        rows[method] = intervals, order.get(method)
    title = f"{figure} by method, with 95 % intervals"
    chart = charts.intervals(
        title, rows, list(map(decoding, ways)), f"{figure}, %", "paper (8B)"
    )
    return {
        "sentences": sentences(means, sum(sizes), figure, order),
        "chart": chart,
        "tables": results_tables([run.root], run.world, means, sizes) + fault_tables([found]),
    }


# ------------------------------------------------------------------ a run as the page sees it


@dataclass
class RunFolder:
    """The files of a run, and what it takes to judge turns as the run did. Where its own critic is not there, the first
    of the others stands in."""

    root: Path
    world: World = field(default_factory=Backend)
    machine: Machine = field(default_factory=Machine)

    @cached_property
    def own(self):
        folders = critics_of(self.root).values()
        return next((folder for folder in folders if (folder / "critic").exists()), self.root)

    @cached_property
    def settings(self):
        found = settings_of(self.root)
        for file in sorted(self.own.glob("settings/*.json")):
            found |= read_json(file, {})
        return found

    @cached_property
    def given(self):
        """The flags, with the paths of what the user brought: `settings` knows a file by its fingerprint alone."""
        return remembered(self.root, "", lambda file: read_json(file, {}))

    def path(self, name):
        return self.own / name

    def offline(self):
        """Yield the offline dialogues."""
        file = Path(self.given.get("trajectories") or self.root / "trajectories.jsonl")
        for _, record in read_records(file, trajectory()) if file.exists() else ():
            yield {**record, "dialogue_history": fold(record["dialogue_history"])}

    @cached_property
    def grade(self):
        return self.world.grader(self.settings.get("clip"), self.settings.get("rollout.call_seconds", 1.0))

    def model(self, name):
        """The initial policy ("base"; perhaps the user's own) or the critic, in the run's number format."""
        tuned = self.settings.get("base.documents")
        given = self.given.get("model") if name == "base" and not tuned else None
        kept = {
            key: self.settings[key] for key in ("dtype", "attention") if key in self.settings
        }
        path = given or (self.root if name == "base" else self.own) / name
        if not given and not path.exists():
            raise InputError(f"{name}/ is not there")
        return load_model(path, replace(self.machine, **kept))

    def critic_settings(self):
        names = [f.name for f in fields(critic.CriticSettings) if f"critic.{f.name}" in self.settings]
        return critic.CriticSettings(**{name: self.settings[f"critic.{name}"] for name in names})


def offline_table(run):
    """The offline dialogues: how many, how often the marker was used, how many tests passed."""
    records = list(run.offline())
    if not records:
        return []
    figure, other = run.world.headers(run.settings)
    rows = [
        [*run.world.figures(record, record), len(record["dialogue_history"]) // 2]
        for record in records
    ]
    means = np.mean(rows, 0)
    used = np.mean(
        [ANSWER_MARKER in record["dialogue_history"][-1]["content"] for record in records]
    )
    tasks = set(map(task_key, records))
    header = ["dialogues", "tasks", "turns", "ended with the marker", f"{figure} %"]
    row = [
        f"{len(records)}",
        f"{len(tasks)}",
        number(means[2], 2),
        f"{100 * used:.0f} %",
        number(means[0]),
    ]
    if not run.world.PAIRED:
        header, row = [*header, f"{other} %"], [*row, number(means[1])]
    return [
        (
            "What the initial policy does by itself: the dialogues that everything else learns from.",
            header,
            [row],
        )
    ]


# ------------------------------------------------------------------ one state, sixteen candidates


def own_records(path):
    """The records of a file that a stage wrote, none where it is not there. Not checked again: it may be large."""
    if path.exists():
        with open(path, encoding="utf-8") as file:
            yield from map(json.loads, file)


def with_pairs(states, pairs, most):
    """Yield the states of candidates.jsonl, each with its "pairs" (chosen text, rejected text) out of pairs.jsonl,
    which is in the same order and holds at most so many for each state."""
    waiting = 0
    for state in states:
        texts = {candidate["content"] for candidate in state["candidates"]}
        state["pairs"] = []
        while waiting < len(pairs) and len(state["pairs"]) < most:
            names = tuple(pairs[waiting][side][0]["content"] for side in ("chosen", "rejected"))
            foreign = fold(pairs[waiting]["prompt"]) != state["messages"]
            if foreign or not texts.issuperset(names) or names in state["pairs"]:
                break
            state["pairs"].append(names)
            waiting += 1
        yield state


def choose_states(states, world):
    """[(title, state)]: an early turn, a late one and an answer. Of each kind the first state at which the world finds
    some candidates good and some not; a late one is as late as there are."""
    best = {}
    for state in states:
        task, known = Task.from_record(state["task"]), []
        for candidate in state["candidates"]:
            kind, good = world.judge(task, state["messages"], candidate["content"])
            known += [(kind == "answer", good)] * candidate.get("count", 1)
        answers = 2 * sum(answer for answer, _ in known) > len(known)
        turn = len(state["messages"]) // 2 + 1
        name = "answer" if answers else "early" if turn == 1 else "late"
        mixed = len({good for answer, good in known if answer == answers}) == 2
        merit = (mixed, turn if name == "late" else 0, min(len(state["candidates"]), 6))
        if known and (name not in best or merit > best[name][0]):
            best[name] = merit, f"turn {turn}", state
    noun = world.TURN[0]
    titles = {"early": f"An early {noun}", "late": f"A late {noun}", "answer": "An answer"}
    found = []
    for name in filter(best.get, titles):
        _, turn, state = best[name]
        found.append((f"{titles[name]}, {turn}", state))
    return found


def ranked(state, world):
    """The candidates in the critic's order, as rows of a table; the line between the halves is `half` rows down.

    The halves are of the samples, so a turn that was sampled often may stand on both sides of the line.
    """
    rows, above, half = [], 0, 0.0
    total = sum(candidate.get("count", 1) for candidate in state["candidates"])
    for candidate in sorted(state["candidates"], key=lambda c: -c["advantage"]):
        count, text = candidate.get("count", 1), candidate["content"]
        share = (
            min(max(total / 2 - above, 0), count) / count
        )  # of its samples, in the better half
        half += share
        above += count
        without_c = candidate.get("ref_sum_without_c")
        known = without_c is not None and candidate["output_ids"]
        noun, good, bad = words_of(world, candidate.get("kind"))
        rows.append(
            {
                "text": world.brief(text).strip() or "(no words)",
                "source": text,
                "count": count,
                "advantage": candidate["advantage"],
                "untrained": (candidate["ref_sum"] - without_c) / len(candidate["output_ids"])
                if known
                else None,
                "half": "better" if share == 1 else "worse" if share == 0 else "both",
                "good": candidate.get("good"),
                "verdict": f"{good if candidate.get('good') else bad} {noun}",
                "pairs": [
                    f"{side} {k}"
                    for k, pair in enumerate(state["pairs"], 1)
                    for side, name in zip(("chosen", "rejected"), pair)
                    if name == text
                ],
            }
        )
        if candidate.get("kind") == "other":
            rows[-1] |= {"good": None, "verdict": "-"}
    return rows, half


def ranking_chart(title, rows, half, names=None, **more):
    classes = [{True: 0, False: 1}.get(row["good"], 2) for row in rows]
    untrained = [row["untrained"] for row in rows]
    untrained = "untrained critic", np.array(untrained, float)  # None becomes NaN
    names = names or list(range(1, len(rows) + 1))
    advantages = [row["advantage"] for row in rows]
    label = "advantage, nats a token"
    return charts.ranking(title, names, advantages, classes, half, untrained, label, **more)


def sixteen(run):
    """The chosen states, ready for the page."""
    states = own_records(run.own / "candidates.jsonl")
    pairs = list(own_records(run.own / "pairs.jsonl"))
    states = with_pairs(states, pairs, run.settings.get("pairs.per_state", 2))
    found = choose_states(states, run.world)
    label_turns([state for _, state in found], run.world.judge, run.grade)
    shown = []
    for title, state in found:
        rows, half = ranked(state, run.world)
        chart = ranking_chart(f"{title}: the critic's advantages", rows, half)
        said = [
            {"role": m["role"], "text": run.world.brief(m["content"])}
            for m in state["messages"][1:]
        ]
        shown.append(
            {
                "title": title,
                "request": state["task"]["problem_description"],
                "said": said,
                "rows": rows,
                "chart": chart,
                "reference": run.world.brief(state["task"]["ground_truth"]),
            }
        )
    return shown


# ------------------------------------------------------------------ is the critic right?


def knowledge(found, world):
    """{method: (turns, mean share in % of what mattered that is known after each)}: turn 0 is the request."""
    known = {}
    for method, records in found.items():
        by_turn = {}
        for record in records:
            task, messages = Task.from_record(record["task"]), record["dialogue_history"]
            for turn in range(max(len(r["dialogue_history"]) for r in records) // 2):
                share = world.known_share(task, messages[: 2 * turn + 1])
                if share is not None:
                    by_turn.setdefault(turn, []).append(100 * share)
        if by_turn:
            known[method] = (
                list(by_turn),
                [float(np.mean(shares)) for shares in by_turn.values()],
            )
    return known


def credit_points(run):
    """{class: (advantages, values in points)} of the candidates that were valued by Monte Carlo, both less the means of
    their state."""
    _, good, bad = run.world.TURN
    groups = {f"{good} or right": ([], []), f"{bad} or wrong": ([], [])}
    for state in own_records(run.own / "credit.jsonl"):
        valued = [candidate for candidate in state["candidates"] if candidate.get("returns")]
        advantages = np.array([candidate["advantage"] for candidate in valued])
        values = np.array([100 * np.mean(candidate["returns"]) for candidate in valued])
        for candidate, x, y in zip(valued, advantages, values):
            xs, ys = list(groups.values())[not candidate.get("good")]
            xs.append(x - advantages.mean())
            ys.append(y - values.mean())
    return groups


def credit_section(run, found):
    points, known = credit_points(run), knowledge(found, run.world)
    checked, shares, figures = credit_tables([run.root], run.world), [], []
    if sum(len(xs) for xs, _ in points.values()) > 1:
        title = "Advantage against Monte Carlo value, a point a candidate"
        labels = (
            "advantage less the state's mean, nats a token",
            "value less the state's mean, points",
        )
        figures.append((title, charts.points(title, points, *labels)))
    if known:
        turns = sorted({turn for turns, _ in known.values() for turn in turns})
        rows = [
            [method, *(number(dict(zip(*found)).get(turn)) for turn in turns)]
            for method, found in known.items()
        ]
        header = ["method", *(f"after turn {turn}" if turn else "request" for turn in turns)]
        shares = [(f"{run.world.KNOWN}, %.", header, rows)]
        if len(turns) > 1:
            title = f"{run.world.KNOWN}, by turn"
            figures.insert(0, (title, charts.curves(title, known, "turn", "%")))
    return {
        "figures": figures,
        "tables": shares + checked,
        "checked": bool(checked),
        "points": any(xs for xs, _ in points.values()),
        "states": (run.own / "credit.jsonl").exists(),
    }


# ------------------------------------------------------------------ losses


def training(run):
    """Charts of the losses, and a line for each log that makes none."""
    folders = {
        "critic": run.own,
        "actor": run.own,
        "multiturn": run.root,
        "rft": run.root,
        "base": run.root,
    }
    figures, notes, order = [], [], {}
    for name, folder in folders.items():
        log = read_json(folder / name / "log.json", [])
        losses = [row["loss"] for row in log if "loss" in row]
        steps = [row for row in log if "loss" in row and np.isfinite(row["loss"])]
        broken = len(losses) - len(steps)
        if not log and not (name == "base" and run.settings.get("model")):
            notes.append(f"{name}: not trained here")
        if broken:
            notes.append(f"{name}: {broken} of {len(losses)} steps had a loss that is not finite")
        if len(steps) == 1:
            notes.append(f"{name}: 1 step, loss {number(steps[0]['loss'], 3)}")
        if len(steps) < 2:
            continue
        shared = set(steps[0]).intersection(*steps)
        columns = {key: np.array([row[key] for row in steps]) for key in shared}
        title = f"{name}: loss, {len(losses)} steps"
        figures.append(charts.training(title, {name: columns["loss"]}))
        if "accuracy" in columns:
            order[name] = columns["accuracy"]
        if name == "critic" and "margin_answers" in columns:
            margin, last = columns["margin"], columns["margin_answers"]
            lines = {"answer turn": last, "earlier turns": margin - last}
            figures.append(charts.training("critic's margin, nats a token", lines))
            notes.append(answers_share(margin, last))
    if order:
        figures.append(charts.training("share of pairs in the right order", order))
    return {"figures": figures, "notes": list(filter(None, notes))}


def answers_share(margin, answers):
    """How much of the critic's margin lies in the answer turn, in each quarter of the training that has a margin."""
    quarters = [
        (a.sum(), b.sum())
        for a, b in zip(np.array_split(answers, 4), np.array_split(margin, 4))
    ]
    shares = [number(100 * a / b, 0) for a, b in quarters if b > 0]
    if len(shares) < 4:
        return ""
    return (
        f"The answer turn's share of the critic's margin in the four quarters of training: {', '.join(shares)} %. "
        "Near 100 %, the critic only knows right answers, and has nothing to say about earlier turns."
    )


# ------------------------------------------------------------------ dialogues


def succeeded(record, base, world):
    """Success, or on pages a win against the base policy."""
    return world.figures(record, base)[int(world.PAIRED)] > 50


def choose_tasks(ended, n):
    """Indices of n tasks such that each method is seen both to succeed and to fail, as far as it does both.

    ended: {method: [success of each task]}. The first task is one that SWEET solves and the base policy does not.
    """
    count = len(next(iter(ended.values())))
    subject = "SWEET" if "SWEET" in ended else next(iter(ended))
    order = sorted(
        range(count),
        key=lambda i: not (ended[subject][i] and not ended.get("base", [False] * count)[i]),
    )
    chosen, seen = [], Counter()
    while len(chosen) < min(n, count):
        gain = {
            i: sum(1 / (1 + seen[m, ended[m][i]]) for m in ended)
            for i in order
            if i not in chosen
        }
        best = max(gain, key=gain.get)
        chosen.append(best)
        seen.update((method, ended[method][best]) for method in ended)
    return chosen


def compare(turn, candidates):
    """A turn beside the other sampled turns, those of other tokens: {"advantage", "share": of them with a smaller
    advantage (ties are half smaller), "distance": to the advantage of the middle one}; no share where there is none.

    turn, candidates: {"output_ids", "advantage"}; a candidate's "count" says how often it was sampled.
    """
    others = [
        [c["advantage"]] * c["count"]
        for c in candidates
        if c["output_ids"] != turn["output_ids"]
    ]
    others, mine = np.concatenate([[], *others]), turn["advantage"]
    if not len(others):
        return {"advantage": mine}
    share = np.mean((others < mine) + 0.5 * (others == mine))
    return {"advantage": mine, "share": share, "distance": mine - np.median(others)}


def colour_of(share, distance):
    """(class, strength from 0 to 1) of a turn's colour: weak where the share is near a half, and where the advantage is
    near the middle candidate's. distance: nats a token."""
    strength = abs(2 * share - 1) * min(1.0, abs(distance) / FULL)
    return ("up" if share >= 0.5 else "down"), strength


def agent_states(record):
    """The states of a dialogue, {"task", "messages", "turn": what the agent said there}."""
    history = actor.bare(record["dialogue_history"])
    return [
        {"task": record["task"], "messages": history[:k], "turn": history[k]}
        for k in range(1, len(history), 2)
    ]


def judge_states(run, states, cfg, max_tokens, rows=512):
    """`compare` the turn of each state with SAMPLED turns of the initial policy there: adds "judged", and "candidates",
    of which the turn itself is the last.

    run: .model(name), .world and .grade; cfg: a critic.CriticSettings; rows: turns that are sampled side by side.
    """
    policy, tokenizer = run.model("base")
    size = max(1, rows // SAMPLED)
    for i in range(0, len(states), size):
        part = states[i : i + size]
        keys = [
            ("report", [message["content"] for message in state["messages"]]) for state in part
        ]
        actor.sample_candidates(policy, tokenizer, part, keys, SAMPLED, max_tokens)
        for state in part:
            state["turn"]["output_ids"] = action_tokens(tokenizer, state["turn"])
            state["candidates"].append(state["turn"])
        critic.score_reference(policy, tokenizer, part)
    del policy  # a model that `run` does not keep makes room for the critic
    find_critic(cfg.kind).score(run, states, cfg)
    for state in states:
        state["judged"] = compare(state["turn"], state["candidates"][:-1])


def judge_turns(run, records):
    """Add "judged" to the records: how each agent turn compares with what the initial policy says there."""
    found = [agent_states(record) for record in records]
    states = [state for states in found for state in states]
    max_tokens = run.settings.get("rollout.max_tokens", 48)
    judge_states(run, states, run.critic_settings(), max_tokens, run.machine.rows)
    for record, states in zip(records, found):
        record["judged"] = [state["judged"] for state in states]


def turns_of(record, world):
    """The messages of a dialogue after the request, as the page shows them."""
    shown = []
    for i, message in enumerate(record["dialogue_history"][1:]):
        before, marker, _ = world.brief(message["content"]).partition(ANSWER_MARKER)
        turn = {"who": "human", "text": before + marker, "as_shown": bool(marker)}
        if message["role"] == "assistant":
            turn["who"] = f"turn {i // 2 + 1}"
            judged = record["judged"][i // 2] if "judged" in record else {}
            if "share" in judged:
                turn["share"] = f"{100 * judged['share']:.0f}"
                turn["colour"], strength = colour_of(judged["share"], judged["distance"])
                turn["strength"] = f"{strength:.2f}"
            if judged:
                turn["advantage"] = number(judged["advantage"], 2, "+")
        else:
            turn |= {"text": world.brief(message["content"]), "as_shown": False}
        shown.append(turn)
    return shown


def dialogues_section(run, found, n):
    """n tasks, on each of them the dialogue of every method side by side. found: {method: records}."""
    if not found:
        return {}
    first = next(iter(found.values()))
    bases = found.get("base", first)
    ended = {
        m: [succeeded(r, base, run.world) for r, base in zip(records, bases)]
        for m, records in found.items()
    }
    chosen, note = choose_tasks(ended, n), ""
    records = [found[method][i] for i in chosen for method in found]
    for record in records:
        record.setdefault(
            "answer", record["dialogue_history"][-1]["content"].partition(ANSWER_MARKER)[2]
        )
    try:
        judge_turns(run, records)
    except InputError as error:  # a model that is not there, or not any more
        note = str(error)
    tasks = []
    for i in chosen:
        task = {"request": first[i]["task"]["problem_description"], "dialogues": []}
        for k, (method, records) in enumerate(found.items()):
            dialogue = {
                "method": method,
                "index": k,
                "won": ended[method][i],
                "turns": turns_of(records[i], run.world),
                "verdict": run.world.verdict(records[i]),
                "evidence": run.world.evidence(records[i], run.grade),
            }
            task["dialogues"].append(dialogue)
        tasks.append(task)
    return {"methods": list(found), "tasks": tasks, "note": note}


def shown_dialogues(run, found):
    """{method: records of the same tasks}: the evaluated ones at the lowest top-p, or else one offline dialogue a
    task. found: the run's evaluations."""
    if found:
        way = min(top_p for _, top_p in found)
        return {method: records for (method, top_p), records in found.items() if top_p == way}
    first = {}
    for record in run.offline():
        first.setdefault(task_key(record), record)
    return {OFFLINE: list(first.values())} if first else {}


# ------------------------------------------------------------------ provenance


def provenance_section(run, defaults):
    """What made the run: commands, code and machines of the stages, their seconds, the settings."""
    made, spent = {}, {}
    for label, folder in critics_of(run.root).items():
        mark = "" if folder == run.root else f" ({label})"
        for stage, origin in read_json(folder / "made.json", {}).items():
            same = tuple((key, text) for key, text in origin.items() if key != "date")
            made.setdefault(same, []).append((origin.get("date", "unknown"), stage + mark))
        for stage, seconds in read_json(folder / "seconds.json", {}).items():
            spent[stage + mark] = seconds
    origins = []
    for same, stages in made.items():
        dates, names = zip(*stages)
        span = " to ".join(dict.fromkeys([min(dates), max(dates)]))
        origins.append({"stages": ", ".join(names), "date": span, **dict(same)})
    chart = charts.durations("Seconds of each stage", spent) if len(spent) > 1 else ""
    defaults = defaults or {}
    rows = [
        (name, value, defaults.get(name, value)) for name, value in sorted(run.settings.items())
    ]
    changed = [row for row in rows if (row[1] or None) != (row[2] or None)]
    return {
        "origins": origins,
        "chart": chart,
        "total": f"{sum(spent.values()):.0f}",
        "changed": changed,
        "compared": bool(defaults),
        "settings": rows,
    }


# ------------------------------------------------------------------ the page


def write(root, out, dialogues=6, world=None, machine=None, defaults=None):
    """Write the page about the run in `root` (on tasks of `world`) to the file `out`, whole or not at all.

    machine: where the models run (a Machine); defaults: {name: value} of the settings without any flag.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    run = RunFolder(Path(root), world or Backend(), machine or Machine())
    evaluated = evaluations(run.root)
    found = shown_dialogues(run, evaluated)
    environment = Environment(
        loader=FileSystemLoader(PAGE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("page.html.j2").render(
        name=run.root.name,
        world=run.world,
        stylesheet=(PAGE / "style.css").read_text(encoding="utf-8"),
        number=number,
        light=charts.variables(1),
        dark=charts.variables(2),
        full=FULL,
        results=first_screen(run, evaluated),
        offline=offline_table(run),
        states=sixteen(run),
        credit=credit_section(run, found if OFFLINE not in found else {}),
        training=training(run),
        dialogues=dialogues_section(run, found, dialogues),
        origin=provenance_section(run, defaults),
    )
    try:
        put_text(out, clean(page))
    except OSError as error:  # a run that can only be read has its table all the same
        note(f"sweet: note: {out} cannot be written ({error.strerror})")
