"""The report: intervals against a brute-force bootstrap, numbers by hand, a page that hostile text cannot break."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

import report
import sweet as program
from docs import pictures
from env import ANSWER_MARKER, render
from machinery import bootstrap, schema
from machinery.files import InputError
from machinery.folder import keep
from machinery.provenance import commit, provenance
from studies import results
from worlds import backend, frontend
from worlds.backend import make_tasks, make_tokenizer

BACKEND = backend.Backend()
HOSTILE = "</script></pre><img src=x onerror=alert(1)>'\"&<svg onload=alert(2)>"


def save_model(folder, tokenizer, seed):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
        initializer_range=0.5,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def record(method, top_p, task, question, answer, reward, questions=1):
    history = [{"role": "user", "content": "instructions " + task["problem_description"]}]
    for _ in range(questions):
        history += [{"role": "assistant", "content": question}, {"role": "user", "content": "I prefer " + question}]
    history.append({"role": "assistant", "content": f"{ANSWER_MARKER}\n{answer}"})
    return {
        "method": method,
        "top_p": top_p,
        "task": task,
        "dialogue_history": history,
        "answer": answer,
        "reward": reward,
    }


def write_eval(folder, rewards, top_ps=(1.0, 0.9), tasks=None, **kwargs):
    """eval.jsonl with rewards {method: [reward of each task]}, the same at each way of decoding."""
    folder.mkdir(parents=True, exist_ok=True)
    n = len(next(iter(rewards.values())))
    tasks = tasks or [t.to_record() for t in make_tasks(n, 0, "test")]
    rows = []
    for method, values in rewards.items():
        for p in top_ps:
            for task, reward in zip(tasks, values):
                answer = task["ground_truth"] if reward == 1.0 else "def f(values):\n    return 'wrong'"
                rows.append(record(method, p, task, kwargs.get("question", "which ones?"), answer, reward))
    (folder / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def log_of(steps, *names):
    rng = np.random.default_rng(0)
    return [
        {"loss": 0.7 - i / 100, "grad_norm": 1.0, **{n: rng.random() + i / 10 for n in names}} for i in range(steps)
    ]


def candidate(content, advantage, count, ids, **more):
    scores = {"ref_sum": -2.0, "ref_sum_without_c": -3.0}
    return {"content": content, "output_ids": ids, "count": count, "advantage": advantage, **scores, **more}


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_candidates(root, task):
    """Two states with the same words, one pair of each; and two candidates that were valued by Monte Carlo."""
    messages = [{"role": "user", "content": "instructions " + task["problem_description"]}]
    turns = [candidate(HOSTILE, 0.5, 3, [1, 2]), candidate("b", -0.001, 2, [3]), candidate("c", -1.0, 3, [4])]
    state = {"task": task, "messages": messages, "candidates": turns}
    write_lines(root / "candidates.jsonl", [state, state])
    sides = {
        side: [{"role": "assistant", "content": text}] for side, text in (("chosen", HOSTILE), ("rejected", "c"))
    }
    other = {**sides, "rejected": [{"role": "assistant", "content": "b"}]}
    write_lines(root / "pairs.jsonl", [{"prompt": messages, **pair} for pair in (sides, other, sides, other)])
    valued = [
        candidate("a", 1.0, 1, [1], returns=[1, 1], good=True),
        candidate("b", 0.0, 1, [2], returns=[0, 1], good=False),
    ]
    write_lines(root / "credit.jsonl", [{**state, "candidates": valued}])


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """A run with every file, whose tasks, dialogues, settings and name are hostile."""
    root, tokenizer = tmp_path_factory.mktemp("runs") / "r&<b>un", make_tokenizer()
    save_model(root / "base", tokenizer, 1)
    save_model(root / "critic", tokenizer, 2)
    tasks = [t.to_record() for t in make_tasks(6, 0, "test")]
    for task in tasks[:3]:
        task["problem_description"] += HOSTILE
        task["ground_truth"] += f"\n# {HOSTILE}"
        task["test_cases"] = {HOSTILE: f"str({HOSTILE!r})", **dict(list(task["test_cases"].items())[:2])}
    rewards = {
        "base": [0.0, 1.0, 0.5, 0.0, 0.0, 0.0],
        "RFT": [1.0, 0, 0, 0, 0, 1.0],
        "multi-turn DPO": [0.0] * 5 + [1.0],
        "SWEET": [1.0, 1.0, 0.2, 1.0, 1.0, 0.0],
    }
    write_eval(root, rewards, tasks=tasks, question=HOSTILE)
    write_eval(root / "without-c", {"SWEET without c": [0.0, 1.0, 0.0, 0.0, 0.0, 0.0]}, tasks=tasks)
    write_json(root / "without-c/settings/critic.json", {"critic.kind": "without-c"})
    for folder, auc in ((root, 0.9), (root / "without-c", 0.6)):
        mc = {"accuracy": auc, "pairs": 8}
        kinds = {"question": {"auc": auc, "states": 7}, "answer": {"auc": None, "states": 0}}
        write_json(folder / "credit.json", {**kinds, "monte_carlo": mc})
    write_candidates(root, tasks[0])
    write_json(root / "critic" / "log.json", log_of(40, "accuracy", "margin", "margin_answers"))
    for name in ("actor", "multiturn"):
        write_json(root / name / "log.json", log_of(30, "accuracy", "margin"))
    for name in ("rft", "base"):
        write_json(root / name / "log.json", log_of(3))
    write_json(
        root / "settings" / "critic.json", {"model": None, "critic.kind": "bradley-terry", "human": HOSTILE + "\ud800"}
    )
    timed = {"base": 50, "rollout": 10, "critic": 20, "samples": 3, "candidates": 4, "pairs": 1, "actor": 7, "rft": 5}
    write_json(root / "seconds.json", {**timed, "multiturn": 6, "eval": 999})
    write_json(root / "without-c" / "seconds.json", {"critic": 40, "candidates": 5, "pairs": 2, "actor": 8})
    return root


@pytest.fixture(scope="module")
def page(whole_run, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "report.html"
    report.write(whole_run, out)
    assert [file.name for file in out.parent.iterdir()] == ["report.html"]
    return out.read_text(encoding="utf-8")


# ------------------------------------------------------------------ the bootstrap


def brute_force(runs, resamples, seed):
    """The two-level bootstrap as its definition reads: draw runs, then tasks of each drawn run."""
    rng, means = np.random.default_rng(seed), []
    for _ in range(resamples):
        drawn = [runs[i] for i in rng.integers(len(runs), size=len(runs))]
        means.append(np.mean([rng.choice(run, size=len(run)).mean() for run in drawn]))
    return np.percentile(means, (2.5, 97.5))


@pytest.mark.parametrize("sizes", [(30, 30, 30, 30), (40,), (12, 50, 25)])
def test_interval_equals_brute_force(sizes):
    rng = np.random.default_rng(5)
    runs = [(rng.random(n) < 0.3 + 0.15 * s).astype(float) for s, n in enumerate(sizes)]
    weights = bootstrap.resample_weights(sizes, resamples=8000)
    assert np.allclose(weights.sum(1), 1)
    mean, low, high = report.interval(weights @ np.concatenate(runs))
    assert mean == pytest.approx(np.mean([run.mean() for run in runs]))
    assert (low, high) == pytest.approx(tuple(brute_force(runs, 4000, 1)), abs=0.015)


def test_spread_between_seeds_widens_the_interval():
    weights = bootstrap.resample_weights([50] * 4)

    def width(values):
        _, low, high = report.interval(weights @ np.array(values, dtype=float))
        return high - low

    alike = [0, 1] * 100
    apart = [0] * 100 + [1] * 100  # the same 200 outcomes, but two seeds fail and two succeed
    assert width(apart) > 3 * width(alike)


def test_bootstrap_is_repeatable():
    assert np.array_equal(bootstrap.resample_weights([5, 6], 50), bootstrap.resample_weights([5, 6], 50))


# ------------------------------------------------------------------ the table


def cells(text, label):
    line = next(line for line in text.splitlines() if line.startswith(f"| {label} "))
    return [cell.strip() for cell in line.strip("|").split("|")]


def credit_cells(text, label):
    return cells(text[text.index("| credit, held-out tasks"):], label)


def test_numbers_of_the_table(whole_run):
    text = report.results_table([whole_run], BACKEND)
    base, sweet, other = (cells(text, name) for name in ("base", "SWEET", "SWEET without c"))
    assert base[1].startswith("16.7 [") and base[3:] == ["25.0", "2.00", "0", "22.4"]
    assert sweet[2].startswith("66.7 [") and sweet[3:] == ["70.0", "2.00", "45", "40.4"]
    assert other[5] == str(10 + 3 + 40 + 5 + 2 + 8)  # rollout and samples are shared, the rest is its own
    assert cells(text, "RFT")[5] == "15" and cells(text, "multi-turn DPO")[5] == "16" and "(50)" in text
    assert cells(text, "SWEET - better baseline")[1].startswith("+33.3 [")
    assert cells(text, "SWEET - better baseline")[1].endswith("(RFT)")
    assert "n = 6 held-out tasks, seeds: 1" in text and "tasks only" in text
    assert credit_cells(text, "SWEET")[1:] == ["0.90 (7 states)", "-", "-", "0.90 (8 pairs)"]
    assert credit_cells(text, "SWEET without c")[1] == "0.60 (7 states)"
    for table in text.split("\n\n")[::2]:
        assert len({len(line) for line in table.strip().splitlines()}) == 1  # padded: columns line up in a terminal


def test_several_seeds(tmp_path):
    for seed, auc in ((0, 0.8), (1, 0.9)):
        rng = np.random.default_rng(seed)
        outcome = (rng.random(20) < 0.5).astype(float).tolist()
        write_eval(tmp_path / str(seed), {"base": outcome, "RFT": outcome, "SWEET": outcome}, top_ps=(1.0,))
        write_json(tmp_path / str(seed) / "credit.json", {"question": {"auc": auc, "states": 5}})
    text = report.results_table([tmp_path / "0", tmp_path / "1", tmp_path / "not evaluated"], BACKEND)
    assert cells(text, "SWEET - RFT")[1] == "+0.0 [+0.0, +0.0]"  # paired: equal outcomes have no difference at all
    assert "n = 20 + 20" in text and "seeds: 2" in text and "seeds and their tasks" in text
    assert credit_cells(text, "SWEET")[1] == "0.85 (0.80 to 0.90, 10 states)"


def test_different_tasks_are_refused(tmp_path):
    write_eval(tmp_path, {"base": [1.0, 0.0]})
    write_eval(tmp_path / "without-c", {"SWEET without c": [1.0, 0.0, 1.0]})
    write_json(tmp_path / "without-c/settings/critic.json", {"critic.kind": "without-c"})
    with pytest.raises(InputError, match="different tasks"):
        report.results_table([tmp_path], BACKEND)


# ------------------------------------------------------------------ the page


class Tags(HTMLParser):
    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes, self.text = set(), set(), ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= set(attrs)

    def handle_data(self, data):
        self.text += data


def test_hostile_text_stays_text(page, whole_run):
    seen = Tags(page)
    assert not seen.tags & {"script", "img", "iframe", "object", "link"}
    assert not [name for name, _ in seen.attributes if name.startswith("on") or name == "src"]
    assert all(value.startswith("#") for name, value in seen.attributes if name == "href")  # a chart's own marks
    assert f"%{HOSTILE}" in seen.text  # a turn, after "better than so many %"
    assert f"I prefer {HOSTILE}" in seen.text and f"# {HOSTILE}" in seen.text
    assert f"human = {HOSTILE}\ufffd" in seen.text and f"Run {whole_run.name}." in seen.text


def test_page_needs_no_network(page):
    assert not re.search(r"https?://|//[a-z]|@import|url\((?!#)", page.replace("http://www.w3.org/2000/svg", ""))
    assert "prefers-color-scheme" in page and "default-src 'none'" in page


def test_page_holds_every_section(page):
    assert "is not there" not in page and "Turns are not judged" not in page
    titles = ["Results", "One state, its candidates", "Is the critic right?", "Dialogues", "Where this comes from"]
    assert re.findall(r"<h2>(.*?)</h2>", page) == titles
    names = re.findall(r'aria-label="(.*?)"', page)
    assert names[0] == "success by method, with 95 % intervals" and len(names) == page.count("<svg") == 12
    assert page.count("<article>") == 6 * 5  # six tasks by five methods
    first = page.split('<div class="task">')[1]
    assert "<h4>base: failure</h4>" in first and "<h4>SWEET: success</h4>" in first
    assert "passes 3 of" in page and "passes 0 of" in page


def test_the_picker_knows_every_method(page):
    for k, method in enumerate([*results.METHODS, "SWEET without c"]):
        assert f'id="method-{k}">{method}</label>' in page
        for end in ("won", "lost"):
            assert f"#method-{k}:checked):has(#end-{end}:checked) .task:not(:has(.method-{k}.{end}))" in page


def test_charts_are_xml_in_the_colours_of_the_page(page):
    for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        ElementTree.fromstring(svg)
        assert not re.search(r"#[0-9a-f]{6}\b", svg) and "font-family" not in svg and ' id="figure' not in svg
        assert set(re.findall(r"var\((.*?)\)", svg)) <= set(re.findall(r"(--\w+):", page))


@pytest.mark.slow
def test_the_same_run_gives_the_same_page(page, whole_run, tmp_path):
    report.write(whole_run, tmp_path / "again.html")
    assert (tmp_path / "again.html").read_text(encoding="utf-8") == page


def test_advantages_are_the_critics(page, whole_run):
    """Eq. 3 by a loop over tokens on the models' own logits, against the numbers on the page."""
    from machinery.train import load_model

    shown = report.evaluations(whole_run)["SWEET", 0.9][0]
    means = []
    for name in ("critic", "base"):
        model, tokenizer = load_model(whole_run / name)
        ids, turns = render(tokenizer, shown["dialogue_history"], shown["task"]["ground_truth"])
        with torch.no_grad():
            logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        found = {}
        for t, turn in enumerate(turns):
            if turn:
                found.setdefault(turn, []).append(logprobs[t - 1, ids[t]].item())
        means.append({turn: np.mean(values) for turn, values in found.items()})
    article = page.split('<div class="one method-3')[1]
    expected = [means[0][turn] - means[1][turn] for turn in (1, 2)]
    shown = re.findall(r'title="advantage ([+-][\d.]+) nats', article.split("</article>")[0])
    assert [float(x) for x in shown] == pytest.approx(expected, abs=0.006)


def turn(advantage, *ids, count=1):
    return {"output_ids": list(ids), "advantage": advantage, "count": count}


def test_share_of_turns_that_are_worse():
    """By hand: of the 8 samples that are other turns, 3 + 2 are worse and 2 are as good: (5 + 2 / 2) / 8."""
    others = [
        turn(-1.0, 1, count=3),
        turn(-0.5, 2, count=2),
        turn(0.1, 3, count=2),
        turn(0.4, 4),
        turn(0.1, 9, count=8),
    ]
    compared = report.compare(turn(0.1, 9), others)
    assert compared == {"advantage": 0.1, "share": 0.75, "distance": pytest.approx(0.1 + 0.5)}
    assert report.compare(turn(0.1, 9), others[-1:]) == {"advantage": 0.1}  # nothing else is said: no share


@pytest.mark.parametrize(
    "share, distance, colour, strength",
    [
        (1.0, 2.0, "up", 1.0),
        (0.0, -2.0, "down", 1.0),
        (1.0, 0.03, "up", 0.1),
        (0.5, 2.0, "up", 0.0),
        (0.25, -0.15, "down", 0.25),
    ],
)
def test_no_full_colour_for_a_small_distance(share, distance, colour, strength):
    assert report.colour_of(share, distance) == (colour, pytest.approx(strength))


def test_candidates_stand_in_the_critics_order_with_their_pairs(page):
    """8 samples: 3 + 1 of the 2 in the middle are the better half. Each state has its own pairs, though the words are
    the same."""
    section = page.split('<section id="candidates">')[1].split("</section>")[0]
    assert "An early question, turn 1" in section
    rows = re.findall(r'<tr class="(\w+) .*?">(.*?)</tr>', section, re.DOTALL)
    cells = [[Tags(cell).text for cell in re.findall(r"<td.*?>(.*?)</td>", row, re.DOTALL)] for _, row in rows]
    assert [kind for kind, _ in rows] == ["better", "both", "worse"]
    assert [row[1] for row in cells] == ["+0.50", "+0.00", "-1.00"] and [row[3] for row in cells] == ["3", "2", "3"]
    assert [row[4] for row in cells] == ["+0.50", "+1.00", "+1.00"]  # (-2 - -3) / L
    assert [row[-1] for row in cells] == ["chosen 1, chosen 2", "rejected 2", "rejected 1"]


def test_pairs_belong_to_their_state():
    a, b = ({"messages": ["m"], "candidates": [{"content": c} for c in names]} for names in ("xyz", "xy"))
    pairs = [
        {"prompt": ["m"], "chosen": [{"content": c}], "rejected": [{"content": r}]} for c, r in ("xz", "xy", "xy")
    ]
    assert [s["pairs"] for s in report.with_pairs([a, b], pairs, 2)] == [[("x", "z"), ("x", "y")], [("x", "y")]]
    assert [s["pairs"] for s in report.with_pairs([b, a], pairs[2:] + pairs[:2], 2)] == [
        [("x", "y")],
        [("x", "z"), ("x", "y")],
    ]  # the first state had but one pair


def test_pairs_belong_to_their_state_behind_a_system_message():
    """In pairs.jsonl it is a message, in candidates.jsonl a field of the user's."""
    words = [{"role": "user", "content": "hello"}]
    state = {"messages": [{**words[0], "system": "s"}], "candidates": [{"content": c} for c in "xy"]}
    pair = {"chosen": [{"content": "x"}], "rejected": [{"content": "y"}]}
    for prompt, found in ((schema.unfold(state["messages"]), [("x", "y")]), (words, [])):
        shown, = report.with_pairs([dict(state)], [{"prompt": prompt, **pair}], 2)
        assert shown["pairs"] == found


def test_points_are_less_their_states_mean(whole_run):
    points = report.credit_points(report.RunFolder(whole_run))
    assert points == {"useful or right": ([0.5], [25.0]), "useless or wrong": ([-0.5], [-25.0])}


def test_knowledge_by_turn():
    """A request that hides everything, then a question about a step that matters: none known, then one of three."""
    task = next(
        t
        for t in make_tasks(60, 0, "test")
        if not backend.known_share(t, [{"role": "user", "content": t.problem_description}])
    )
    history = [{"role": "user", "content": task.problem_description}]
    step, value = next(iter(backend.read_function(task.ground_truth).items()))
    said = f"Please {backend.STEPS[step].values[value][0]}."
    history += [
        {"role": "assistant", "content": "?"},
        {"role": "user", "content": said},
        {"role": "assistant", "content": "!"},
    ]
    known = report.knowledge({"m": [{"task": task.to_record(), "dialogue_history": history}]}, backend)
    assert known == {"m": ([0, 1], [0.0, pytest.approx(100 / 3)])}


def intervals_of(**lead):
    """Means of redrawn tasks where each method's interval is (mean - 1, mean + 1)."""
    noise = np.linspace(-1, 1, 2001)
    return {
        (m, 1.0): np.stack([np.concatenate([[mean], mean + noise * width])] * 3, 1)
        for m, (mean, width) in lead.items()
    }


def test_the_finding_is_what_the_intervals_say():
    means = intervals_of(base=(20, 0), RFT=(39.5, 0), SWEET=(40, 1))
    text = report.sentences(means, 90, "success", {"base": 1.0, "RFT": 2.0, "SWEET": 3.0})
    assert text[0] == "Found: SWEET has more success than base at T=1."
    assert text[1] == "Not found: a difference between SWEET and RFT at T=1."
    assert "SWEET > RFT > base, 1 of 3 comparisons hold here" in text[2] and "open: " in text[2]
    worse = report.sentences(intervals_of(base=(20, 0), SWEET=(10, 1)), 90, "success", {"base": 1.0, "SWEET": None})
    assert worse == ["Found: SWEET has less success than base at T=1."]
    alike = report.sentences(intervals_of(base=(0, 0), SWEET=(100, 0)), 90, "success", {"base": 1.0, "SWEET": None})
    few = report.sentences(means, 3, "success", {})
    assert few == ["Too little to say what was found: 3 methods, 3 held-out tasks."]
    assert alike == ["Not found: a difference between SWEET and base at T=1."]  # one or two tasks tell nothing


def text_of(path):
    seen = Tags(re.sub(r"<style>.*?</style>", "", path.read_text(encoding="utf-8"), flags=re.DOTALL))
    return seen.text


def test_numbers_without_riddles():
    shown = [report.number(*some) for some in ((-0.04, 1, "+"), (-0.004, 2), (float("nan"),), (None,), (-0.06, 1))]
    assert shown == ["+0.0", "0.00", "-", "-", "-0.1"]


def test_nothing_misleads_on_odd_runs(tmp_path):
    """One task, one step, losses that are no numbers, nothing timed, leads of a negative zero."""
    write_eval(tmp_path, {"base": [0.0], "RFT": [1e-9], "SWEET": [0.0]}, question="Hm")
    for name in ("critic", "actor"):
        write_json(tmp_path / name / "log.json", log_of(1, "accuracy", "margin", "margin_answers"))
    write_json(tmp_path / "rft" / "log.json", [{"loss": float("nan")}] * 3)
    report.write(tmp_path, tmp_path / "report.html", defaults={"seed": 0})
    text = text_of(tmp_path / "report.html")
    assert not re.search(r"\bnan\b|-0\.0+\b|(?<!\w)\?|\binf\b", text)
    assert "critic: 1 step, loss 0.700" in text and "rft: 3 of 3 steps had a loss that is not finite" in text
    table = report.results_table([tmp_path], BACKEND)
    assert "| nan" not in table and "-0.0" not in table


def test_no_advice_to_make_what_was_given(tmp_path):
    write_json(tmp_path / "settings" / "rollout.json", {"model": "some/hub-name"})
    report.write(tmp_path, tmp_path / "report.html")
    assert "base: not trained" not in text_of(tmp_path / "report.html")


def test_rollouts_alone(tmp_path):
    tasks = [t.to_record() for t in make_tasks(2, 0, "train")]
    rows = [
        record("", 1, task, "which ones?", task["ground_truth"], reward)
        for task, reward in zip(tasks * 2, (1, 0.5, 0, 0))
    ]
    for row in rows:
        del row["method"], row["top_p"]
    rows[3]["dialogue_history"][-1]["content"] = "I do not know"
    write_lines(tmp_path / "trajectories.jsonl", rows)
    report.write(tmp_path, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    cells = re.findall(r"<td>(.*?)</td>", page.split("Offline dialogues")[1])[:6]
    assert cells == ["4", "2", "2.00", "75 %", "25.0", "37.5"]
    assert page.count("<article>") == 2 and "Turns are not judged: base/ is not there." in page


def test_the_words_are_the_worlds(tmp_path):
    write_json(tmp_path / "credit.json", {"question": {"auc": 0.5, "states": 2}})
    write_eval(tmp_path / "eval", {"base": [0.2], "SWEET": [0.4]})
    write_json(tmp_path / "eval" / "settings" / "eval.json", {"clip": "some/clip"})
    assert "AUC, drafts" in report.results_table([tmp_path], frontend.Frontend())
    assert "AUC, questions" in report.results_table([tmp_path], BACKEND)
    assert "similarity (CLIP) %, T=1" in report.results_table([tmp_path / "eval"], frontend.Frontend())


def test_provenance(whole_run, tmp_path):
    root = tmp_path / "run"
    origin = {
        "command": "python sweet.py --seed 3",
        "commit": "abc1234",
        "date": "today",
        "machine": "m",
        "versions": "v",
    }
    write_json(root / "made.json", {"base": origin, "rollout": {**origin, "date": "tomorrow"}})
    write_json(root / "seconds.json", {"base": 50.2, "rollout": 9.9})
    write_json(root / "settings" / "rollout.json", {"seed": 3, "critic.lr": 0.1, "model": None})
    report.write(root, root / "report.html", defaults={"seed": 0, "critic.lr": 0.1, "model": ""})
    page = (root / "report.html").read_text(encoding="utf-8")
    assert "<dt>stages</dt><dd>base, rollout</dd>" in page and "<dd>today to tomorrow</dd>" in page
    assert "60 seconds in all" in page
    assert "<dt>command</dt><dd>python sweet.py --seed 3</dd>" in page and "<dt>commit</dt><dd>abc1234</dd>" in page
    changed = page.split("Settings that differ from the defaults")[1].split("</dl>")[0]
    assert re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", changed) == [("seed", "3 <span>(default 0)</span>")]


def test_where_git_knows_nothing(tmp_path):
    assert commit(tmp_path) == "unknown"
    assert set(provenance()) == {"command", "commit", "date", "machine", "versions"}


def test_the_readmes_pictures_are_drawn_from_the_committed_numbers(tmp_path):
    docs = Path(report.__file__).parent / "docs"
    for name in ("table.json", "candidates.json"):
        shutil.copy(docs / name, tmp_path)
    pictures.draw(tmp_path)
    for name in ("results.svg", "candidates.svg"):
        drawn = (tmp_path / name).read_text(encoding="utf-8")
        assert drawn == (docs / name).read_text(encoding="utf-8") and "prefers-color-scheme:dark" in drawn
        ElementTree.fromstring(drawn)
    table = report.read_json(docs / "table.json")
    for method, ways in table["methods"].items():  # as in the README's table
        row = next(
            r
            for r in (docs.parent / "README.md").read_text(encoding="utf-8").splitlines()
            if r.startswith(f"| {method} |")
        )
        assert [report.bracketed(found) for found in ways] == [cell.strip() for cell in row.split("|")[2:4]]


@pytest.mark.slow
def test_initial_policy_from_elsewhere(whole_run, page, tmp_path):
    root = tmp_path / whole_run.name
    shutil.copytree(whole_run, root)
    shutil.move(root / "base", tmp_path / "mine")
    report.write(root, tmp_path / "out.html")
    without = (tmp_path / "out.html").read_text(encoding="utf-8")
    assert 'title="advantage' not in without and "Turns are not judged: base/ is not there." in without
    write_json(root / "settings" / "critic.json", {"model": str(tmp_path / "mine"), "critic.kind": "bradley-terry"})
    report.write(root, tmp_path / "out.html")
    numbers = re.findall(r"<b>.*?</b>", page)
    assert re.findall(r"<b>.*?</b>", (tmp_path / "out.html").read_text(encoding="utf-8")) == numbers and numbers
    assert all("better than" in text or "nothing else" in text for text in numbers)


def test_files_from_elsewhere_are_found_by_their_paths(tmp_path, monkeypatch):
    """A run's settings hold a file's name and content; where it lies, the flags know."""
    task, = make_tasks(1, 0, "train")
    row = record("", 1, task.to_record(), "which ones?", task.ground_truth, 1.0)
    write_lines(tmp_path / "t.jsonl", [row])
    (tmp_path / "a.gguf").write_text("a model")
    run = program.open_run(["critic", "--run", str(tmp_path / "run"), "--model", str(tmp_path / "a.gguf"),
                            "--trajectories", str(tmp_path / "t.jsonl")])
    run.claim("critic")
    keep(run)
    found = report.RunFolder(run.root)
    assert found.settings["model"].startswith("a.gguf (sha256 ")
    monkeypatch.setattr(report, "load_model", lambda path, machine: path)
    assert found.model("base") == str(tmp_path / "a.gguf")
    assert len(list(found.offline())) == 1


@pytest.mark.slow
def test_a_run_without_c_alone(whole_run, tmp_path):
    """Its curves, dialogues and advantages are shown, and only what was not run is said to be absent."""
    root, own = tmp_path / "run", tmp_path / "run" / "without-c"
    for name in ("base", "critic", "actor"):
        shutil.copytree(whole_run / name, (root if name == "base" else own) / name)
    write_eval(own, {"SWEET without c": [0.0, 1.0, 0.0]})
    write_json(own / "settings" / "critic.json", {"critic.kind": "without-c", "seed": 7})
    report.write(root, own / "report.html")
    page = (own / "report.html").read_text(encoding="utf-8")
    assert page.count("<article>") == 3 and page.count("SWEET without c: ") == 3 and page.count("<b>") >= 6
    assert "critic: loss, 40 steps" in page and "actor: loss, 30 steps" in page and "seed = 7" in page
    assert re.findall(r"python sweet.py (\w+)</code>", page) == ["candidates", "credit"]
    assert "rft: not trained here" in page and "multiturn: not trained here" in page


def test_all_tasks_alike_is_not_certainty(tmp_path):
    for rewards, said in (([0.0, 0.0, 0.0], True), ([0.0, 1.0, 0.0], False)):
        write_eval(tmp_path / str(said), {"base": rewards})
        assert ("A bracket of no width" in report.results_table([tmp_path / str(said)], BACKEND)) is said


def test_missing_files_name_their_stage(tmp_path):
    (tmp_path / "run").mkdir()
    assert "python sweet.py eval" in report.results_table([tmp_path / "run"], BACKEND)
    report.write(tmp_path / "run", tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    for stage in ("eval", "candidates", "credit"):
        assert f"python sweet.py {stage}</code>" in page
    assert "<svg" not in page and "<article>" not in page


def test_training_that_blew_up_is_still_drawn(tmp_path):
    log = [{"loss": float("nan")}, {"loss": float("inf")}, {"loss": 1.0}, {"loss": 0.5}]
    write_json(tmp_path / "rft" / "log.json", log)
    report.write(tmp_path, tmp_path / "report.html")
    page = Path(tmp_path / "report.html").read_text(encoding="utf-8")
    assert "rft: loss, 4 steps" in page and "rft: 2 of 4 steps had a loss that is not finite" in page
