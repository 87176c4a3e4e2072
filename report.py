"""The report: what a run learned, as a table for the terminal and the README, and as one HTML page for reading.

Two questions are answered here. *Did it work?* `results_table` compares the methods by success on held-out tasks. Two
things vary from one run to the next, the seed (another base policy, other offline data) and the tasks, so the
intervals come from a two-level bootstrap: draw runs with replacement, then tasks within each drawn run; 95 % of the
redrawn means lie in the interval. A difference of two methods is taken on the same redrawn runs and tasks, which
removes what both share. *What was learned?* `write` draws the training curves, splits the critic's margin between
answers and questions, and prints held-out dialogues whose turns are coloured by the critic's advantage (Eq. 3).

Place in the data flow: the last room. Everything is read from the files of a run (eval.jsonl, credit.json, */log.json,
seconds.json, settings/), and a file that is not there costs its section, no more. The page is one file without scripts
or network; what models wrote is escaped. Exercised by `python sweet.py report`, `python sweet.py table` and
`python -m pytest tests/test_report.py`.

Shapes: R resamples, S runs (seeds), N task results of all runs.
"""

import json
import os
from html import escape
from pathlib import Path
from string import Template

import numpy as np

from env import ANSWER_MARKER, InputError, Task, grade, read_jsonl

PAPER = {"base": "22.4", "RFT": "28.2", "multi-turn DPO": "34.4", "SWEET": "40.4", "SWEET without c": "31.2"}  # Table 2, 3
STAGES = {  # what each method costs after the base policy; "without c" has a critic, candidates, pairs, actor of its own
    "base": (),
    "RFT": ("rollout", "rft"),
    "multi-turn DPO": ("rollout", "multiturn"),
    "SWEET": ("rollout", "critic", "samples", "candidates", "pairs", "actor"),
}
STAGES["SWEET without c"] = STAGES["SWEET"]
VARIANTS = {"with c": "", "without c": "no-reference"}  # folder of each under a run
CREDIT = {"AUC, questions": ("question", "auc", "states"), "AUC, answers": ("answer", "auc", "states"),
          "pairs as Monte Carlo": ("monte_carlo", "accuracy", "pairs")}  # fmt: skip


def read_json(path):
    """The content of a JSON file, or None where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


# ------------------------------------------------------------------ did it work?


def dialogues_of(root):
    """The evaluation of a run: {(method, top_p): its records, in the order of the tasks}."""
    found = {}
    for folder in VARIANTS.values():
        if (root / folder / "eval.jsonl").exists():
            for _, record in read_jsonl(root / folder / "eval.jsonl", ("method", "top_p", "task", "reward")):
                found.setdefault((record["method"], record["top_p"]), []).append(record)
    for (method, _), records in found.items():
        if [r["task"] for r in records] != [r["task"] for r in next(iter(found.values()))]:
            raise InputError(f"{root}: {method} was evaluated on other tasks than the first method; run eval again")
    return found


def resample_weights(sizes, resamples=2000, seed=0):
    """Two-level bootstrap as a matrix: weights_RN @ values_N are the redrawn means, the plain mean being row 0.

    sizes: number of tasks of each of the S runs. A mean is the mean over runs of the mean over a run's tasks. A run
    that is drawn k times gets k * n of its n tasks, each time anew, and the tasks' counts are a multinomial.
    """
    rng, S = np.random.default_rng(seed), len(sizes)
    drawn_RS = rng.multinomial(S, [1 / S] * S, size=resamples)
    counts = [rng.multinomial(drawn_RS[:, s] * n, [1 / n] * n) / (S * n) for s, n in enumerate(sizes)]
    plain = np.repeat([1 / (S * n) for n in sizes], sizes)
    return np.vstack([plain, np.concatenate(counts, axis=1)])


def interval(means_R):
    """(mean, low, high): row 0, and the range that holds the middle 95 % of the redrawn means."""
    return (means_R[0], *np.percentile(means_R[1:], (2.5, 97.5)))


def summarise(runs):
    """{(method, top_p): array of R + 1 rows: percent success, percent of tests passed, turns}, and tasks of each run.

    A method counts when every run that was evaluated has it.
    """
    found = [f for f in map(dialogues_of, runs) if f]
    if not found:
        return {}, []
    sizes = [len(next(iter(f.values()))) for f in found]
    weights_RN, means = resample_weights(sizes), {}
    known = [(m, p) for m in STAGES for p in sorted({p for _, p in found[0]}, reverse=True)]
    for key in known + [key for key in found[0] if key not in known]:
        if all(key in f for f in found):
            rows = [(100 * (r["reward"] == 1.0), 100 * r["reward"], len(r["dialogue_history"]) // 2)
                    for f in found for r in f[key]]  # fmt: skip
            means[key] = weights_RN @ np.array(rows, dtype=float)
    return means, sizes


def seconds_of(root, method):
    """Seconds of the stages that a method needs, NaN where one is not known."""
    spent = read_json(root / "seconds.json") or {}
    if method == "SWEET without c":
        shared = {name: spent[name] for name in ("rollout", "samples") if name in spent}
        spent = (read_json(root / "no-reference" / "seconds.json") or {}) | shared
    return sum(spent.get(stage, np.nan) for stage in STAGES.get(method, ("?",)))


def decoding(top_p):
    return "T=1" if top_p == 1 else f"top-p {top_p:g}"


def tables(runs):
    """[(caption, header, rows)]: the results, the differences, the credit; those that the runs have files for."""
    means, sizes = summarise(runs)
    out = []
    if means:
        ways = sorted({top_p for _, top_p in means}, reverse=True)
        methods = list(dict.fromkeys(method for method, _ in means))
        rows = []
        for method in methods:
            last, spent = means[method, ways[-1]], np.mean([seconds_of(root, method) for root in runs])
            rows.append([method, *("{:.1f} [{:.1f}, {:.1f}]".format(*interval(means[method, p][:, 0])) for p in ways),
                         f"{last[0, 1]:.1f}", f"{last[0, 2]:.2f}", f"{spent:.0f}" if spent == spent else "?",
                         PAPER.get(method, "-")])  # fmt: skip
        base = np.mean([(read_json(root / "seconds.json") or {}).get("base", 0) for root in runs])
        caption = (f"{sum(sizes)} dialogues a cell: {' + '.join(map(str, sizes)) if len(set(sizes)) > 1 else sizes[0]} held-out "
                   f"tasks, {len(sizes)} seed{'s' * (len(sizes) > 1)}. [95 % intervals]: bootstrap over "
                   + ("seeds, and tasks within seeds. " if len(sizes) > 1 else "tasks only, for there is one seed. ")
                   + f"Tests and turns at {decoding(ways[-1])}. Seconds: the stages that the method needs, a seed's mean; "
                   f"the base policy itself took {base:.0f} s more.")  # fmt: skip
        header = ["method", *(f"success %, {decoding(p)}" for p in ways), "tests passed %", "turns", "seconds",
                  "paper (8B, real ColBench)"]  # fmt: skip
        out.append((caption, header, rows))
        out += differences(means, ways, methods)
    return out + credit_table(runs)


def differences(means, ways, methods):
    """SWEET minus every other method, on the same redrawn runs and tasks."""
    others = [m for m in methods if m != "SWEET"]
    both = [m for m in ("RFT", "multi-turn DPO") if m in methods]
    if "SWEET" not in methods or not others:
        return []
    rows = []
    for label in others + ["the better baseline"] * (len(both) == 2):
        cells = []
        for p in ways:
            other = label if label in others else max(both, key=lambda m: means[m, p][0, 0])
            gap = interval((means["SWEET", p] - means[other, p])[:, 0])
            cells.append("{:+.1f} [{:+.1f}, {:+.1f}]".format(*gap) + f" ({other})" * (other != label))
        rows.append([f"SWEET - {label}", *cells])
    caption = "Differences of success in points, paired: both methods on the same seeds and tasks."
    return [(caption, ["difference", *map(decoding, ways)], rows)]


def credit_of(runs):
    """{critic: {measure: (mean, min, max over runs, number of states or pairs)}}, what was not measured left out."""
    out = {}
    for label, folder in VARIANTS.items():
        found = [c for root in runs if (c := read_json(root / folder / "credit.json"))]
        for name, (kind, value, count) in CREDIT.items():
            rows = [c[kind] for c in found if c.get(kind, {}).get(value) is not None]
            if rows:
                values = [row[value] for row in rows]
                total = f"{sum(row[count] for row in rows)} {count}"
                out.setdefault(label, {})[name] = (np.mean(values), min(values), max(values), total)
    return out


def credit_table(runs):
    def cell(found):
        if found is None:
            return "-"
        return "{:.2f} ({:.2f} to {:.2f}; {})".format(*found) if len(runs) > 1 else "{0:.2f} ({3})".format(*found)

    rows = [[f"critic {label}", *(cell(found.get(name)) for name in CREDIT)] for label, found in credit_of(runs).items()]
    caption = "Credit on held-out tasks: a right critic scores 1, guessing .5" + "; min to max over seeds." * (len(runs) > 1)
    return [(caption, ["credit", *CREDIT], rows)] if rows else []


def results_table(runs):
    """The results of one run or of several seeds as Markdown, padded so that it reads well in a terminal too."""
    text = []
    for caption, header, rows in tables([Path(root) for root in runs]):
        widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
        lines = [header, ["-" * width for width in widths], *rows]
        text.append("\n".join("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines) + f"\n\n{caption}\n")
    return "\n".join(text) or "No results yet: eval.jsonl is made by `python sweet.py eval`.\n"


def html_tables(root):
    def row(cells, tag):
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return "".join(
        f"<div class=scroll><table>{row(header, 'th')}{''.join(row(cells, 'td') for cells in rows)}</table></div>"
        f"<p class=note>{escape(caption)}</p>"
        for caption, header, rows in tables([root])
    )


# ------------------------------------------------------------------ drawings


def ticks(low, high):
    """About four round numbers from low to high."""
    raw = (high - low) / 3.2
    power = 10.0 ** np.floor(np.log10(raw))
    step = power * next(m for m in (1, 2, 5, 10) if m * power >= raw)
    return [float(round(step * i, 10)) for i in range(int(np.ceil(low / step)), int(np.floor(high / step)) + 1)]


def smooth(values):
    """Running mean over about a fifteenth of the curve."""
    width = max(1, len(values) // 15)
    window = np.ones(width)
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")


def chart(title, x_label, lines):
    """Inline SVG: {name: one value a step}, a smoothed line over the faint raw one, its values as tooltips."""
    lines = {name: np.asarray(values, dtype=float) for name, values in lines.items()}
    every = np.concatenate(list(lines.values()))
    low, high = np.percentile(every, (1, 99)) + (-1e-3, 1e-3)
    percent = len(lines) > 1 and len({len(v) for v in lines.values()}) > 1
    longest = max(map(len, lines.values()))

    def xy(i, value, n):
        return 46 + 300 * i / max(1, n - 1), 186 - 166 * (np.clip(value, low, high) - low) / (high - low)

    def path(values, n, css):
        points = " ".join("{:.1f},{:.1f}".format(*xy(i, values[i], n)) for i in range(0, n, max(1, n // 300)))
        return f'<polyline class="{css}" points="{points}"/>'

    svg = [f'<line class=grid x1=46 x2=346 y1={y:.1f} y2={y:.1f} /><text x=40 y={y + 4:.1f} class=end>{tick:g}</text>'
           for tick in ticks(low, high) for y in [xy(0, tick, 2)[1]]]  # fmt: skip
    for tick in ticks(0, 100 if percent else max(1, longest - 1)):
        svg.append(f"<text x={xy(tick, low, 101 if percent else longest)[0]:.1f} y=204 class=mid>{tick:g}</text>")
    svg.append(f"<text x=346 y=222 class=end>{'share of training, %' if percent else x_label}</text>")
    for k, (name, values) in enumerate(lines.items()):
        n, calm = len(values), smooth(values)
        svg += [path(values, n, f"raw k{k}"), path(calm, n, f"line k{k}")]
        for i in range(0, n, max(1, n // 24)):
            tip = f"{name}, step {i + 1} of {n}: {calm[i]:.3g} (raw {values[i]:.3g})"
            x, y = xy(i, calm[i], n)
            svg.append(f"<circle cx={x:.1f} cy={y:.1f} r=6><title>{escape(tip)}</title></circle>")
    key = "".join(f"<span class=k{k}>{escape(name)}</span>" for k, name in enumerate(lines)) if len(lines) > 1 else ""
    return (f'<figure><figcaption>{escape(title)} <span class=key>{key}</span></figcaption><svg viewBox="0 0 352 228" '
            f'role=img aria-label="{escape(title)}">{"".join(svg)}</svg></figure>')  # fmt: skip


def whiskers(rows, low, high, unit):
    """Inline SVG: (label, mean, low, high) a row, a dot on its interval; labels with SWEET or 'with c' in the accent."""
    def x(value):
        return 190 + 440 * (min(max(value, low), high) - low) / (high - low)

    bottom = 26 * len(rows) + 8
    svg = [f"<line class=grid x1={x(t):.1f} x2={x(t):.1f} y1=4 y2={bottom} /><text class=mid x={x(t):.1f} y={bottom + 16}>"
           f"{t:g}{unit}</text>" for t in ticks(low, high)]  # fmt: skip
    for i, (label, mean, lower, upper, strong) in enumerate(rows):
        y, tip = 20 + 26 * i, f"{label}: {mean:.3g} [{lower:.3g}, {upper:.3g}]"
        svg.append(f'<g class="{"own" if strong else "other"}"><text x=176 y={y + 4} class=end>{escape(label)}</text><line class=bar '
                   f"x1={x(lower):.1f} x2={x(upper):.1f} y1={y} y2={y} /><circle class=dot cx={x(mean):.1f} cy={y} r=4.5>"
                   f"<title>{escape(tip)}</title></circle></g>")  # fmt: skip
    return f'<figure class=wide><svg viewBox="0 0 660 {bottom + 22}" role=img>{"".join(svg)}</svg></figure>'


def training(root):
    """The training curves that there are, and one line for each stage that was not run."""
    stages = {"critic": "Eq. 2", "actor": "Eq. 4", "multiturn": "DPO", "rft": "imitation", "base": "imitation"}
    logs = {name: read_json(root / name / "log.json") for name in stages}
    figures = "".join(chart(f"{name}: loss ({stages[name]})", "step", {name: [row["loss"] for row in log]})
                      for name, log in logs.items() if log)  # fmt: skip
    logs["critic without c"] = read_json(root / "no-reference" / "critic" / "log.json")
    order = {name: [r["accuracy"] for r in log] for name, log in logs.items() if log and "accuracy" in log[0]}
    if order:
        figures += chart("pairs in the right order: share", "step", order)
    note = ("Faint: every step; strong: running mean; point at a curve for its values. Preference losses begin at log 2 = 0.69, "
            "where every pair is a coin toss, plus the likelihood term where a stage has one; the lower, the better the stage "
            "tells chosen from rejected.")  # fmt: skip
    gone = [absent(f"{name}/log.json", name) for name in stages if not logs[name]]
    return f"<div class=charts>{figures}</div><p class=note>{note if figures else ''}</p>{''.join(gone)}"


def margin(root):
    """Which turns does the critic tell winners by? Its margin in the answer turn and in the turns before it."""
    log = read_json(root / "critic" / "log.json")
    if not log:
        return absent("critic/log.json", "critic")
    whole, answers = (np.array([row[key] for row in log]) for key in ("margin", "margin_answers"))
    late = slice(-max(1, len(log) // 4), None)
    share = smooth(answers) / np.where(np.abs(smooth(whole)) > 0.02, smooth(whole), np.nan)
    first = int(np.argmax(~np.isnan(share)))
    curves = chart("margin, nats a token", "step", {"answer turn": answers, "earlier turns": whole - answers})
    curves += chart("answer turn's share of the margin, %", f"step, from {first + 1}", {"share": 100 * np.clip(np.nan_to_num(share[first:]), 0, 1)})
    return (f"<div class=charts>{curves}</div><p class=note>The margin is by how much the winner's advantages exceed the loser's. In "
            f"the last quarter {100 * answers[late].mean() / (whole[late].mean() or 1):.0f} % of it comes from the last turn, usually "
            "the answer. Where that nears 100 %, the critic recognises right answers and has nothing left to say about questions.</p>")  # fmt: skip


def results(root):
    means, _ = summarise([root])
    figure = ""
    if means:
        last = min(top_p for _, top_p in means)
        rows = [(method, *interval(column[:, 0]), method == "SWEET") for (method, p), column in means.items() if p == last]
        figure = whiskers(rows, 0, 100, " %") + (f"<p class=note>Success at {decoding(last)}, mean and 95 % interval: where "
            "intervals overlap, look at the paired differences before you believe in one.</p>")  # fmt: skip
    return figure + (html_tables(root) or absent("eval.jsonl", "eval"))


def credit(root):
    rows = [(f"{name}, {label}", found[name][0], found[name][0], found[name][0], label == "with c")
            for name in CREDIT for label, found in credit_of([root]).items() if name in found]  # fmt: skip
    if not rows:
        return absent("credit.json", "credit")
    return whiskers(rows, 0, 1, "") + ("<p class=note>AUC: how often a useful question (a right answer) gets a larger advantage than "
        "another of the same state; Monte Carlo: how often the larger advantage also has the larger chance of success, found by "
        "playing on. 0.5 is guessing.</p>")  # fmt: skip


def absent(path, stage):
    return f"<p class=absent>{path} is not there; <code>python sweet.py {stage}</code> makes it.</p>"


# ------------------------------------------------------------------ dialogues


def choose(found, n):
    """Records to show, SWEET's at the last way of decoding: half successes, half failures, first one that the base policy
    fails on, with the base's record; a list of (SWEET's, base's or None)."""
    last = min((p for method, p in found if method == "SWEET"), default=None)
    pairs = list(zip(found.get(("SWEET", last), []), found.get(("base", last), []) or [None] * 10**6))
    won, lost = ([pair for pair in pairs if (pair[0]["reward"] == 1.0) is good] for good in (True, False))
    won.sort(key=lambda pair: bool(pair[1]) and pair[1]["reward"] == 1.0)
    half = max(n // 2, n - len(lost))
    shown = won[:half] + lost[: n - len(won[:half])]
    return [(mine, base if i == 0 else None) for i, (mine, base) in enumerate(shown)]


def advantages_of(root, records):
    """The critic's advantage of every turn (Eq. 3): a list of lists, or InputError with what is missing."""
    from critic import critic_view, turn_advantages
    from kernels.fit import load_model
    from kernels.logprob import collate, turn_logprobs

    settings = read_json(root / "settings" / "critic.json") or {}
    base, read = root / "base", []
    if not base.exists() and settings.get("model"):
        base = settings["model"]
    for path in (root / "critic", base):
        if path is not settings.get("model") and not (path / "config.json").exists():
            raise InputError(f"{path.name}/")
        model, tokenizer = load_model(path)
        views = [critic_view(tokenizer, record, settings.get("critic.reference", True)) for record in records]
        read.append([tensor.detach() for tensor in turn_logprobs(model, collate(views))])
    (sums, lengths), (ref_sums, _) = read
    return turn_advantages(sums, ref_sums, lengths, settings.get("critic.normalize", "turn")).tolist()


def tests_of(records):
    """Which tests each answer passes, one list of booleans a record: every test is graded as a task of its own."""
    single = [(r.get("answer") or "", Task(r["task"]["problem_description"], r["task"]["ground_truth"], {name: call}))
              for r in records for name, call in r["task"].get("test_cases", {}).items()]  # fmt: skip
    passed = iter(grade(*zip(*single)) if single else [])
    return [[next(passed) == 1.0 for _ in r["task"].get("test_cases", {})] for r in records]


def code(text, other):
    """A program, the lines that the other one lacks marked."""
    theirs = {line.strip() for line in other.splitlines()}
    rows = [escape(row) if row.strip() in theirs else f"<mark>{escape(row)}</mark>" for row in text.splitlines()]
    return f"<pre>{chr(10).join(rows)}</pre>"


def show(record, advantages, scale, passed):
    """One dialogue: turns on the left, reference, answer and tests on the right."""
    task, turns, number = record["task"], [], 0
    for i, message in enumerate(record["dialogue_history"]):
        text = task["problem_description"] if i == 0 else message["content"]
        if message["role"] != "assistant":
            turns.append(f"<div class=human><i>human</i>{escape(text)}</div>")
            continue
        value = advantages[number] if advantages else 0.0
        number += 1
        text = escape(text.split(ANSWER_MARKER)[0] + ANSWER_MARKER) + " <i>see answer</i>" if ANSWER_MARKER in text else escape(text)
        style = f"class='agent {'up' if value >= 0 else 'down'}' style='--a:{min(1, abs(value) / scale):.2f}'"
        turns.append(f"<div {style}><b>{f'{value:+.2f}' if advantages else ''}</b><i>turn {number}</i>{text}</div>")
    answer, reference = record.get("answer") or "", task["ground_truth"]
    tests = "".join(f"<li class={'ok' if ok else 'no'}>{escape(str(call))}</li>"
                    for ok, call in zip(passed, task.get("test_cases", {}).values()))  # fmt: skip
    marks = "".join("✓" if ok else "✗" for ok in passed)
    return (f"<article><h3>{escape(record['method'])}: {'success' if record['reward'] == 1.0 else 'failure'}</h3><div class=talk>"
            f"{''.join(turns)}</div><aside><h4>reference, unseen by the agent</h4>{code(reference, answer)}<h4>answer</h4>"
            f"{code(answer, reference)}<details><summary>{sum(passed)} of {len(passed)} tests passed {marks}</summary><ul>{tests}</ul>"
            "</details></aside></article>")  # fmt: skip


def dialogues_section(root, n):
    shown = choose(dialogues_of(root), n)
    if not shown:
        return absent("eval.jsonl", "eval")
    records = [record for pair in shown for record in pair if record]
    try:
        advantages, gone = advantages_of(root, records), ""
    except InputError as error:
        advantages, gone = [[]] * len(records), absent(error, str(error)[:-1])
    scale = np.percentile([abs(a) for row in advantages for a in row if a] or [1.0], 90)
    blocks = [show(*each) for each in zip(records, advantages, [scale] * len(records), tests_of(records))]
    first = 2 if shown[0][1] else 1
    note = (f"Blue turns the critic likes better than the initial policy did, orange ones less (full colour: {scale:.2f} nats a token or "
            "more; the number is the advantage). Marked lines are those in which reference and answer differ.")  # fmt: skip
    return f"<p class=note>{note}</p>{gone}<div class=pair>{''.join(blocks[:first])}</div>{''.join(blocks[first:])}"


# ------------------------------------------------------------------ the page

PAGE = Template("""<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width,initial-scale=1">
<meta http-equiv=Content-Security-Policy content="default-src 'none'; style-src 'unsafe-inline'"><title>sweet: $name</title><style>
:root{color-scheme:light dark;--ink:#23272b;--soft:#667079;--rule:#e3e6e8;--paper:#fdfdfc;--own:#14639e;--up:33 110 180;--down:222 120 20}
@media(prefers-color-scheme:dark){:root{--ink:#dfe3e6;--soft:#97a1a9;--rule:#30363b;--paper:#15181a;--own:#6db3ec;--up:70 150 225;--down:235 140 50}}
*{box-sizing:border-box}body{margin:0 auto;padding:3rem 1.2rem 6rem;max-width:68rem;font:16px/1.6 system-ui,sans-serif;color:var(--ink);
background:var(--paper)}h1{font:600 2rem/1.2 Georgia,serif;margin:0}h2{font:600 1.35rem/1.3 Georgia,serif;margin:4.5rem 0 1rem}
h3{font-size:1rem;margin:0 0 .6rem;grid-column:1/-1}h4{font-weight:400;font-size:.8rem;color:var(--soft);margin:.8rem 0 .2rem}
.note,.absent,.lead{color:var(--soft);max-width:44rem;font-size:.92rem}.scroll{overflow-x:auto}table{border-collapse:collapse;margin-top:1.5rem;
font-size:.88rem;font-variant-numeric:tabular-nums}th,td{text-align:left;padding:.4rem 1.4rem .4rem 0;border-bottom:1px solid var(--rule)}
td{white-space:nowrap}th{font-weight:400;color:var(--soft);vertical-align:bottom}svg{width:100%;display:block;overflow:visible}
figure{margin:0}.wide{max-width:42rem}.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(18rem,1fr));gap:2rem 2.5rem}
figcaption{font-size:.88rem;margin-bottom:.4rem}text{font-size:11px;fill:var(--soft)}.end{text-anchor:end}.mid{text-anchor:middle}
.grid{stroke:var(--rule)}polyline{fill:none;stroke:var(--own);stroke-width:1.8;stroke-linejoin:round}.raw{opacity:.22;stroke-width:1}
polyline.k1,polyline.k2,polyline.k3{stroke:var(--ink)}.line.k2{stroke-dasharray:6 3}.line.k3{stroke-dasharray:2 3}circle{fill:transparent}
circle:hover{fill:var(--own)}.bar{stroke:var(--soft);stroke-width:2}.dot{fill:var(--soft)}.own .bar{stroke:var(--own)}.own .dot{fill:var(--own)}
.own text{fill:var(--own)}.key span{margin-left:.9rem;color:var(--soft);font-size:.8rem;white-space:nowrap}.key span:before{content:"";
display:inline-block;width:1.4rem;border-top:2px solid var(--ink);vertical-align:middle;margin-right:.35rem}.key .k0:before{border-color:var(--own)}
.key .k2:before{border-top-style:dashed}.key .k3:before{border-top-style:dotted}article{display:grid;grid-template-columns:3fr 2fr;gap:0 2.5rem;
margin-top:2.5rem;padding-top:1rem;border-top:1px solid var(--rule);font-size:.92rem;align-content:start}.pair{display:grid;gap:0 3rem;
grid-template-columns:1fr 1fr}.pair article:not(:only-child),.pair article:only-child{min-width:0}.pair article:not(:only-child){display:block}
.pair article:only-child{grid-column:1/-1}.talk>div{padding:.45rem .8rem;margin-bottom:.4rem;border-left:4px solid transparent;overflow-wrap:anywhere;
white-space:pre-wrap}.talk i,aside i{color:var(--soft);font-size:.78rem;margin-right:.6rem}.agent{background:rgb(var(--hue)/calc(var(--a)*.32));
border-color:rgb(var(--hue)/calc(.15 + var(--a)*.85))!important}.up{--hue:var(--up)}.down{--hue:var(--down)}.agent b{float:right;margin-left:1rem;
font-weight:600;font-variant-numeric:tabular-nums}pre,li,code{font:.8rem/1.5 ui-monospace,Menlo,Consolas,monospace}pre{margin:0;overflow-x:auto}
mark{color:inherit;background:none;text-decoration:underline;text-decoration-color:rgb(var(--down));text-decoration-thickness:2px;
text-underline-offset:3px}aside{min-width:0}details{margin-top:.8rem;font-size:.85rem}summary{cursor:pointer}ul{list-style:none;padding:0;overflow-x:auto}
li{white-space:nowrap}li:before{content:"✗ ";color:rgb(var(--down))}li.ok:before{content:"✓ ";color:rgb(var(--up))}
@media(max-width:46rem){article,.pair{grid-template-columns:minmax(0,1fr)}}</style><h1>What this run learned</h1>
<p class=lead>Run <b>$name</b>. An agent asks a person what they want, then writes a function. SWEET trains a critic that has read the solution to judge
every turn, and teaches the agent to prefer the turns that the critic prefers.</p>$sections
<h2>Settings</h2><details><summary>every hyper-parameter of this run</summary><pre>$settings</pre></details></html>
""")


def write(root, out, dialogues=8):
    """Write the page about the run in `root` to the file `out`, whole or not at all."""
    root, out = Path(root), Path(out)
    sections = {"Results": results(root), "Is the critic right?": credit(root), "Training": training(root),
                "Where the critic's margin comes from": margin(root),
                "Dialogues on held-out tasks": dialogues_section(root, dialogues)}  # fmt: skip
    settings = {}
    for path in sorted((root / "settings").glob("*.json")):
        settings |= read_json(path)
    page = PAGE.substitute(
        name=escape(root.name),
        sections="".join(f"<h2>{title}</h2>{text}" for title, text in sections.items()),
        settings=escape("\n".join(f"{name} = {value}" for name, value in sorted(settings.items()))),
    )
    partial = Path(f"{out}.partial")
    partial.write_bytes(page.encode("utf-8", "replace"))
    os.replace(partial, out)
