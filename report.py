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

import sys
from html import escape
from pathlib import Path
from string import Template

import numpy as np

from env import ANSWER_MARKER
from machinery.files import InputError, put_text, read_json
from machinery.schema import evaluation, read_records
from worlds import backend

METHODS = ("base", "RFT", "multi-turn DPO", "SWEET", "SWEET without c")
SWEET = "rollout critic samples candidates pairs actor"  # the stages that a method needs after the base policy
STAGES = dict(zip(METHODS, ("", "rollout rft", "rollout multiturn", SWEET, SWEET)))
FOLDERS = {"with c": "", "without c": "no-reference"}  # under a run; without c, what follows the critic is its own
CREDIT = (("question", "auc", "states"), ("answer", "auc", "states"), ("monte_carlo", "accuracy", "pairs"))


# ------------------------------------------------------------------ did it work?


def evaluations(root):
    """The evaluated dialogues of a run: {(method, top_p): records in the order of the tasks}, which all share."""
    found = {}
    for file in (root / folder / "eval.jsonl" for folder in FOLDERS.values()):
        for _, record in read_records(file, evaluation()) if file.exists() else ():
            found.setdefault((record["method"], record["top_p"]), []).append(record)
    tasks = {key: [record["task"] for record in records] for key, records in found.items()}
    if any(tasks[key] != next(iter(tasks.values())) for key in tasks):
        raise InputError(f"{root}: eval.jsonl holds different tasks for different methods; run the stage eval again")
    return found


def resample_weights(sizes, resamples=2000, seed=0):
    """Two-level bootstrap as a matrix: weights_RN @ values_N are the redrawn means, except row 0, the plain mean.

    sizes: number of tasks of each of the S runs. A mean is the mean over runs of the mean over a run's tasks. A run
    that is drawn k times gets k * n of its n tasks, drawn anew each time: how often each comes is a multinomial.
    """
    rng, S = np.random.default_rng(seed), len(sizes)
    drawn_RS = rng.multinomial(S, [1 / S] * S, size=resamples)
    counts = [rng.multinomial(drawn_RS[:, s] * n, [1 / n] * n) / (S * n) for s, n in enumerate(sizes)]
    plain = np.repeat([1 / (S * n) for n in sizes], sizes)
    return np.vstack([plain, np.concatenate(counts, axis=1)])


def interval(means_R):
    """(mean, low, high): row 0, and the ends of the middle 95 % of the redrawn means."""
    return (means_R[0], *np.percentile(means_R[1:], (2.5, 97.5)))


def summarise(runs, world):
    """{(method, top_p): 1 + R rows (the world's two figures in %, turns)}, and the number of tasks of each run.

    Runs without an evaluation are left out; a method counts when all others have it.
    """
    found = [f for f in map(evaluations, runs) if f]
    sizes, means = [len(next(iter(f.values()))) for f in found], {}
    weights_RN = resample_weights(sizes) if sizes else None
    for key in [(m, p) for m in STAGES for p in sorted({p for f in found for _, p in f}, reverse=True)]:
        if all(key in f for f in found):
            pairs = [pair for f in found for pair in zip(f[key], f.get(("base", key[1]), f[key]))]
            rows = [[*world.figures(r, base), len(r["dialogue_history"]) // 2] for r, base in pairs]
            means[key] = weights_RN @ np.array(rows)
    return means, sizes


def seconds_of(root, method):
    """Seconds of all stages that a method needs, NaN where one was not timed."""
    spent = [read_json(root / folder / "seconds.json", {}) for folder in FOLDERS.values()]
    own = set(SWEET.split()) - {"rollout", "samples"} if method == "SWEET without c" else ()
    return sum(spent[stage in own].get(stage, np.nan) for stage in STAGES[method].split())


def decoding(top_p):
    return "T=1" if top_p == 1 else f"top-p {top_p:g}"


def results_tables(runs, world=backend):
    """[(caption, header, rows)] of the results and of SWEET's lead, none where nothing was evaluated."""
    means, sizes = summarise(runs, world)
    if not means:
        return []
    methods, ways = ([*dict.fromkeys(names)] for names in zip(*means))
    rows, lead = [], []
    for method in methods:
        cells = ["{:.1f} [{:.1f}, {:.1f}]".format(*interval(means[method, p][:, 0])) for p in ways]
        _, other, turns = means[method, ways[-1]][0]
        seconds = np.mean([seconds_of(root, method) for root in runs])
        rows.append([method, *cells, f"{other:.1f}", f"{turns:.2f}", f"{seconds:.0f}", world.PAPER[method]])
    baselines = [m for m in ("RFT", "multi-turn DPO") if m in methods]
    others = {f"SWEET - {m}": [m] for m in methods if m != "SWEET"} | {"SWEET - better baseline": baselines}
    for label, choice in others.items() if "SWEET" in methods and baselines else ():
        best = [max(choice, key=lambda m: means[m, p][0, 0]) for p in ways]
        gaps = [interval((means["SWEET", p] - means[m, p])[:, 0]) for m, p in zip(best, ways)]
        named = [f" ({m})" * (len(choice) > 1) for m in best]
        lead.append([label, *("{:+.1f} [{:+.1f}, {:+.1f}]".format(*gap) + name for gap, name in zip(gaps, named))])
    over = "tasks only, there being one seed" if len(sizes) == 1 else "seeds and their tasks"
    figures = world.headers(read_json(runs[0] / "settings" / "rollout.json", {}))
    base = np.mean([read_json(root / "seconds.json", {}).get("base", 0) for root in runs])
    caption = (
        f"n = {' + '.join(map(str, sizes))} held-out tasks, seeds: {len(sizes)}. Brackets: 95 % intervals, bootstrap "
        f"over {over}. {figures[1].capitalize()}, turns: {decoding(ways[-1])}. Seconds: all stages after the base "
        f"policy ({base:.0f})."
    )
    if any(np.ptp(mean_R3[:, 0]) == 0 for mean_R3 in means.values()):
        caption += " A bracket of no width: all of these tasks came out alike; it does not say how others will."
    header = ["method", *(f"{figures[0]} %, {decoding(p)}" for p in ways), f"{figures[1]} %", "turns", "seconds"]
    gaps = (f"Points of {figures[0]}, on the same redrawn seeds and tasks.", ["difference", *map(decoding, ways)], lead)
    seconds = [[m, *("{:.1f} [{:.1f}, {:.1f}]".format(*interval(means[m, p][:, 1])) for p in ways)] for m in methods]
    more = (f"The same, with intervals: {figures[1]} %.", [figures[1], *map(decoding, ways)], seconds)
    return [(caption, [*header, "paper (8B, real ColBench)"], rows)] + [gaps] * bool(lead) + [more] * world.PAIRED


def credit_tables(runs):
    """[(caption, header, rows)] of how often each critic is right: mean over runs, range, number of states or pairs."""
    rows = []
    for label, folder in FOLDERS.items():
        found, cells = [c for root in runs if (c := read_json(root / folder / "credit.json"))], []
        for kind, value, count in CREDIT:
            scores = [c[kind][value] for c in found if c.get(kind, {}).get(value) is not None]
            total = f"{sum(c.get(kind, {}).get(count, 0) for c in found)} {count}"
            spread = f"{min(scores):.2f} to {max(scores):.2f}, " if len(scores) > 1 else ""
            cells.append(f"{np.mean(scores):.2f} ({spread}{total})" if scores else "-")
        rows += [[f"critic {label}", *cells]] * bool(found)
    caption = (
        "AUC: how often a useful question (a right answer) has a larger advantage than a useless (wrong) one there; "
        "Monte Carlo: how often a turn has that leads to success more often than another. 0.5: guessing, 1: perfect."
    )
    header = ["credit, held-out tasks", "AUC, questions", "AUC, answers", "agrees with Monte Carlo"]
    return [(caption, header, rows)] if rows else []


def results_table(runs, world=backend):
    """The results of one run or of several seeds as Markdown, padded so that it reads well in a terminal too."""
    runs, text = [Path(root) for root in runs], []
    for caption, header, rows in results_tables(runs, world) + credit_tables(runs):
        widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
        lines = [header, ["-" * width for width in widths], *rows]
        text += ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines] + ["", caption, ""]
    return "\n".join(text) or "No results yet: eval.jsonl is made by `python sweet.py eval`.\n"


def html_tables(tables):
    text = ""
    for caption, header, rows in tables:
        cells = ["".join(f"<td>{escape(cell)}" for cell in row) for row in [header, *rows]]
        text += f"<table><tr>{'<tr>'.join(cells)}</table><p>{escape(caption)}</p>"
    return text


# ------------------------------------------------------------------ drawings


def ticks(low, high):
    """A few round numbers from low to high."""
    power = 10.0 ** np.floor(np.log10((high - low) / 4))
    step = power * next(m for m in (1, 2, 5, 10) if m * power >= (high - low) / 4)
    return [round(step * i, 10) for i in range(int(np.ceil(low / step)), int(high / step) + 1)]


def smooth(values):
    """Running mean over a fifteenth of the curve."""
    window = np.ones(max(1, len(values) // 15))
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")


def chart(title, lines):
    """Inline SVG of {name: one value a step}: a strong running mean over the faint values; tooltips give both."""
    low, high = np.percentile(np.concatenate([*lines.values()]), (1, 99)) + (-1e-3, 1e-3)

    def xy(share, value):
        return f"{44 + 300 * share:.1f}", f"{186 - 166 * (np.clip(value, low, high) - low) / (high - low):.1f}"

    marks = [(t, xy(0, t)[1]) for t in ticks(low, high)]
    svg = [f"<path d='M44 {y}h300'/><text x=38 y={y} dy=4 class=end>{t:g}</text>" for t, y in marks]
    svg += [f"<text x={44 + 3 * t} y=204>{t}</text>" for t in (0, 25, 50, 75)] + ["<text x=344 y=204>100 %</text>"]
    for k, (name, values) in enumerate(lines.items()):
        n, calm = len(values), smooth(values)
        for css, curve in (("raw", values), ("", calm)):
            points = " ".join(",".join(xy(i / n, curve[i])) for i in range(0, n, max(1, n // 300)))
            svg.append(f"<polyline class='k{k} {css}' points='{points}'/>")
        for i in range(0, n, max(1, n // 24)):
            (x, y), tip = xy(i / n, calm[i]), f"{name}, step {i + 1} of {n}: {calm[i]:.3g} (raw {values[i]:.3g})"
            svg.append(f"<circle cx={x} cy={y} r=6><title>{tip}</title></circle>")
    key = "".join(f"<i class=k{k}>{name}</i>" for k, name in enumerate(lines)) if len(lines) > 1 else ""
    return f"<figure>{title}<br>{key}<svg viewBox='0 0 352 212'>{''.join(svg)}</svg></figure>"


# ------------------------------------------------------------------ sections of the page


def absent(file, stage):
    return f"<p>{file} is not there: <code>python sweet.py {stage}</code> makes it.</p>"


def training(root, own):
    """The training curves, and the critic's margin by kind of turn; a line for each stage that was not run."""
    folders = {"critic": own, "actor": own, "multiturn": root, "rft": root, "base": root}
    logs = {name: read_json(folder / name / "log.json") for name, folder in folders.items()}
    gone = "".join(absent(f"{name}/log.json", name) for name, log in logs.items() if not log)
    logs = {n: {k: np.nan_to_num([r[k] for r in log], posinf=0) for k in log[0]} for n, log in logs.items() if log}
    figures = [chart(f"{name}: loss, {len(log['loss'])} steps", {name: log["loss"]}) for name, log in logs.items()]
    order = {name: log["accuracy"] for name, log in logs.items() if "accuracy" in log}
    figures += [chart("share of pairs in the right order", order)] if order else []
    text = f"""<div class=charts>{"".join(figures)}</div>{gone}<p>Across: % of training. Faint: each step; strong:
        running mean; point at a curve for its values. A preference loss starts at log 2 = 0.69, a coin toss (plus a
        likelihood term where a stage has one), and falls as chosen and rejected come apart.</p>"""
    if "critic" in logs:
        whole, last = logs["critic"]["margin"], logs["critic"]["margin_answers"]
        parts = zip(*(np.array_split(values, 4) for values in (last, whole)))
        shares = ", ".join(f"{100 * a.sum() / b.sum():.0f}" if b.sum() > 0 else "?" for a, b in parts)
        figure = chart("critic's margin, nats a token", {"answer turn": last, "earlier turns": whole - last})
        text += f"""<div class=charts>{figure}</div><p>How far the better dialogue's advantages exceed the worse one's.
            The answer turn's share of it in the four quarters of training: {shares} %. Near 100 %, the critic only
            knows right answers, and has nothing to say about questions.</p>"""
    return text


# ------------------------------------------------------------------ dialogues


def choose(found, n):
    """n of SWEET's records, half of them successes; then the base policy's record of the first one's task, or None.

    First comes a task that SWEET solves and the base policy does not. SWEET without c stands in for SWEET.
    """
    sweet = min((key for key in found if key[0].startswith("SWEET")), default=(None, None))  # and the lowest top-p
    mine, base = found.get(sweet, []), found.get(("base", sweet[1]))
    won, lost = ([i for i, r in enumerate(mine) if (r["reward"] == 1) is good] for good in (True, False))
    won.sort(key=lambda i: base is not None and base[i]["reward"] == 1)
    shown = won[: max(n // 2, n - len(lost))]
    shown += lost[: n - len(shown)]
    return [mine[i] for i in shown], base[shown[0]] if base and shown else None


def advantages_of(root, own, records):
    """The critic's advantage of every turn (Eq. 3), a list for each record; [] for each where a model is missing."""
    from critic import critic_view, turn_advantages
    from machinery.train import load_model
    from kernels.logprob import collate, turn_logprobs

    settings, read = read_json(own / "settings" / "critic.json", {}), []
    paths = (own / "critic", Path(settings.get("model") or root / "base"))
    if not all(path.exists() for path in paths):
        return [[] for _ in records]
    for path in paths:
        model, tokenizer = load_model(path)
        views = [critic_view(tokenizer, record, settings.get("critic.reference", True)) for record in records]
        read.append([tensor.detach() for tensor in turn_logprobs(model, collate(views))])
    (sums_BK, lengths_BK), (ref_BK, _) = read
    return turn_advantages(sums_BK, ref_BK, lengths_BK, settings.get("critic.normalize", "turn")).tolist()


def show(record, advantages, scale, world):
    """One dialogue: turns on the left; what the world has to show of it on the right."""
    turns = [f"<div><i>human</i>{escape(record['task']['problem_description'])}</div>"]
    for i, message in enumerate(record["dialogue_history"][1:], 1):
        text, who, style, number = escape(world.brief(message["content"])), "human", "", ""
        if message["role"] == "assistant":
            who, value = f"turn {i // 2 + 1}", advantages[i // 2] if advantages else 0.0
            style = f" class='{'up' if value >= 0 else 'down'}' style='--a:{min(1, abs(value) / scale):.2f}'"
            number = f"<b>{value:+.2f}</b>" if advantages else ""
            before, marker, _ = text.partition(ANSWER_MARKER)
            text = f"{before}{marker} <i>as shown</i>" if marker else text
        turns.append(f"<div{style}>{number}<i>{who}</i>{text}</div>")
    return f"""<article><h3>{escape(record["method"])}: {world.verdict(record)}</h3><section>{"".join(turns)}</section>
        <aside>{world.evidence(record)}</aside></article>"""


def dialogues_section(root, own, n, world):
    records, base = choose(evaluations(root), n)
    if not records:
        return absent("SWEET's part of eval.jsonl", "eval")
    records[1:1] = [base] if base else []
    advantages = advantages_of(root, own, records)
    scale = np.percentile([abs(a) for row in advantages for a in row if a] or [1.0], 90)
    shown = [show(record, row, scale, world) for record, row in zip(records, advantages)]
    pair = f"<div class=pair>{shown.pop(0)}{shown.pop(0)}</div>" if base else ""
    note = f"""<p>The number on a turn is its advantage. Blue: the critic finds the turn more likely than the initial
        policy does; orange: less (full colour from {scale:.2f} nats a token). {world.LEGEND} The agent never sees the
        reference.</p>"""
    gone = "" if any(advantages) else absent("critic/ or the initial policy, for the advantages,", "critic")
    return f"{note}{gone}{pair}{''.join(shown)}"


# ------------------------------------------------------------------ the page

PAGE = Template("""<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width">
<meta http-equiv=Content-Security-Policy content="default-src 'none';style-src 'unsafe-inline';img-src data:">
<title>$name</title>
<style>:root{color-scheme:light dark;--up:35 120 190;--down:224 120 25;--soft:color-mix(in srgb,canvastext 64%,canvas);
--rule:color-mix(in srgb,canvastext 13%,canvas)}@media(prefers-color-scheme:dark){:root{--up:95 170 235;
--down:240 150 60}}body{margin:auto;padding:3rem 1.2rem 6rem;max-width:66rem;font:16px/1.6 system-ui,sans-serif}
figure{margin:0;font-size:.88rem}h1,h2{font-family:Georgia,serif;line-height:1.2;margin:4.5rem 0 1rem}h1{margin:0}
h3{font-size:1rem;grid-column:1/-1}h4,p,i,text,tr:first-child{color:var(--soft);fill:var(--soft);font-weight:400}
h4{margin:.8rem 0 .2rem}b{float:right}p{max-width:44rem;font-size:.92rem}i{font:.78rem sans-serif;margin-right:.7rem}
img{width:calc(50% - 4px);margin:0 2px;outline:1px solid var(--rule)}
table,pre,ul{display:block;overflow:auto}table{border-collapse:collapse;margin-top:2rem;font-size:.88rem}
b,td{font-variant-numeric:tabular-nums}.up{--hue:var(--up)}td{padding:.4rem 1.5rem .4rem 0;
border-bottom:1px solid var(--rule);white-space:nowrap}.down{--hue:var(--down)}svg{width:100%;overflow:visible}
text{font-size:11px;text-anchor:middle}.end{text-anchor:end}path{stroke:var(--rule)}.pair,article{display:grid;
gap:0 2.5rem;grid-template-columns:repeat(auto-fill,minmax(min(26rem,100%),1fr))}.charts{display:grid;gap:2rem;
grid-template-columns:repeat(auto-fill,minmax(min(18rem,100%),1fr));margin-top:2rem}polyline{fill:none;
stroke:canvastext;stroke-width:1.8}.k0{stroke:rgb(var(--up))}.k2{stroke-dasharray:5 3}circle{fill:transparent}
circle:hover{fill:rgb(var(--up))}.raw{opacity:.2;stroke-width:1}.raw.k1,.raw.k2{opacity:.1}i.k0:before{content:"━ ";
color:rgb(var(--up))}i.k1:before{content:"━ ";color:canvastext}i.k2:before{content:"╍ ";color:canvastext}
article>*{min-width:0}article{margin-top:2rem;border-top:1px solid var(--rule);font-size:.92rem;align-content:start}
pre,ul{margin:0;padding:0}section div{padding:.45rem .8rem;margin-bottom:.4rem;white-space:pre-wrap;
overflow-wrap:anywhere;border-left:4px solid rgb(var(--hue)/calc(.15 + var(--a)*.85));
background:rgb(var(--hue)/calc(var(--a)*.32))}b{margin-left:1rem}pre,li,code{font:.8rem/1.5 ui-monospace,monospace}
li{white-space:nowrap;list-style:none}mark{color:inherit;background:none;border-bottom:solid rgb(var(--down))}</style>
<h1>What this run learned</h1><p>Run $name. An agent asks a person what they want, then answers. SWEET trains
a critic that reads the solution to judge every turn, and the agent, who does not, to prefer what the critic does.</p>
$sections<h2>Settings</h2><details><summary>settings of this run</summary><pre>$settings</pre></details></html>
""")


def write(root, out, dialogues=8, world=backend):
    """Write the page about the run in `root` (on tasks of `world`) to the file `out`, whole or not at all. Curves and
    dialogues are of SWEET without c where nothing else was trained."""
    root = Path(root)
    own = next((root / folder for folder in FOLDERS.values() if (root / folder / "critic").exists()), root)
    sections = {
        "Results": html_tables(results_tables([root], world)) or absent("eval.jsonl", "eval"),
        "Is the critic right?": html_tables(credit_tables([root])) or absent("credit.json", "credit"),
        "Training": training(root, own),
        "Dialogues on held-out tasks": dialogues_section(root, own, dialogues, world),
    }
    files = sorted(root.glob("settings/*.json")) + sorted(own.glob("settings/*.json"))
    settings = {k: v for path in files for k, v in read_json(path, {}).items()}
    text = escape("\n".join(f"{name} = {value}" for name, value in sorted(settings.items())))
    body = "".join(f"<h2>{title}</h2>{section}" for title, section in sections.items())
    page = PAGE.substitute(name=escape(root.name), sections=body, settings=text)
    try:
        put_text(out, page.encode("utf-8", "replace").decode())  # a lone surrogate from a model becomes "?"
    except OSError as error:  # a run that can only be read has its table all the same
        print(f"sweet: note: {out} cannot be written ({error.strerror})", file=sys.stderr)
