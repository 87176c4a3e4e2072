"""The report: intervals against a brute-force bootstrap, numbers by hand, a page that hostile text cannot break."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

import report
from env import ANSWER_MARKER, render
from machinery.files import InputError
from worlds.backend import make_tasks, make_tokenizer

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
    write_eval(root / "no-reference", {"SWEET without c": [0.0, 1.0, 0.0, 0.0, 0.0, 0.0]}, tasks=tasks)
    for folder, auc in ((root, 0.9), (root / "no-reference", 0.6)):
        mc = {"accuracy": auc, "pairs": 8}
        kinds = {"question": {"auc": auc, "states": 7}, "answer": {"auc": None, "states": 0}}
        write_json(folder / "credit.json", {**kinds, "monte_carlo": mc})
    write_json(root / "critic" / "log.json", log_of(40, "accuracy", "margin", "margin_answers"))
    for name in ("actor", "multiturn"):
        write_json(root / name / "log.json", log_of(30, "accuracy", "margin"))
    for name in ("rft", "base"):
        write_json(root / name / "log.json", log_of(3))
    write_json(
        root / "settings" / "critic.json", {"model": None, "critic.normalize": "turn", "human": HOSTILE + "\ud800"}
    )
    timed = {"base": 50, "rollout": 10, "critic": 20, "samples": 3, "candidates": 4, "pairs": 1, "actor": 7, "rft": 5}
    write_json(root / "seconds.json", {**timed, "multiturn": 6, "eval": 999})
    write_json(root / "no-reference" / "seconds.json", {"critic": 40, "candidates": 5, "pairs": 2, "actor": 8})
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
    weights = report.resample_weights(sizes, resamples=8000)
    assert np.allclose(weights.sum(1), 1)
    mean, low, high = report.interval(weights @ np.concatenate(runs))
    assert mean == pytest.approx(np.mean([run.mean() for run in runs]))
    assert (low, high) == pytest.approx(tuple(brute_force(runs, 4000, 1)), abs=0.015)


def test_spread_between_seeds_widens_the_interval():
    weights = report.resample_weights([50] * 4)

    def width(values):
        _, low, high = report.interval(weights @ np.array(values, dtype=float))
        return high - low

    alike = [0, 1] * 100
    apart = [0] * 100 + [1] * 100  # the same 200 outcomes, but two seeds fail and two succeed
    assert width(apart) > 3 * width(alike)


def test_bootstrap_is_repeatable():
    assert np.array_equal(report.resample_weights([5, 6], 50), report.resample_weights([5, 6], 50))


# ------------------------------------------------------------------ the table


def cells(text, label):
    line = next(line for line in text.splitlines() if line.startswith(f"| {label} "))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_numbers_of_the_table(whole_run):
    text = report.results_table([whole_run])
    base, sweet, other = (cells(text, name) for name in ("base", "SWEET", "SWEET without c"))
    assert base[1].startswith("16.7 [") and base[3:] == ["25.0", "2.00", "0", "22.4"]
    assert sweet[2].startswith("66.7 [") and sweet[3:] == ["70.0", "2.00", "45", "40.4"]
    assert other[5] == str(10 + 3 + 40 + 5 + 2 + 8)  # rollout and samples are shared, the rest is its own
    assert cells(text, "RFT")[5] == "15" and cells(text, "multi-turn DPO")[5] == "16" and "(50)" in text
    assert cells(text, "SWEET - better baseline")[1].startswith("+33.3 [")
    assert cells(text, "SWEET - better baseline")[1].endswith("(RFT)")
    assert "n = 6 held-out tasks, seeds: 1" in text and "tasks only" in text
    assert cells(text, "critic with c")[1:] == ["0.90 (7 states)", "-", "0.90 (8 pairs)"]
    assert cells(text, "critic without c")[1] == "0.60 (7 states)"
    for table in text.split("\n\n")[::2]:
        assert len({len(line) for line in table.strip().splitlines()}) == 1  # padded: columns line up in a terminal


def test_several_seeds(tmp_path):
    for seed, auc in ((0, 0.8), (1, 0.9)):
        rng = np.random.default_rng(seed)
        outcome = (rng.random(20) < 0.5).astype(float).tolist()
        write_eval(tmp_path / str(seed), {"base": outcome, "RFT": outcome, "SWEET": outcome}, top_ps=(1.0,))
        write_json(tmp_path / str(seed) / "credit.json", {"question": {"auc": auc, "states": 5}})
    text = report.results_table([tmp_path / "0", tmp_path / "1", tmp_path / "not evaluated"])
    assert cells(text, "SWEET - RFT")[1] == "+0.0 [+0.0, +0.0]"  # paired: equal outcomes have no difference at all
    assert "n = 20 + 20" in text and "seeds: 2" in text and "seeds and their tasks" in text
    assert cells(text, "critic with c")[1] == "0.85 (0.80 to 0.90, 10 states)"


def test_different_tasks_are_refused(tmp_path):
    write_eval(tmp_path, {"base": [1.0, 0.0]})
    write_eval(tmp_path / "no-reference", {"SWEET without c": [1.0, 0.0, 1.0]})
    with pytest.raises(InputError, match="different tasks"):
        report.results_table([tmp_path])


# ------------------------------------------------------------------ the page


class Tags(HTMLParser):
    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes, self.text = set(), set(), ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data):
        self.text += data


def test_hostile_text_stays_text(page, whole_run):
    seen = Tags(page)
    assert not seen.tags & {"script", "img", "iframe", "object", "link"}
    assert not [name for name in seen.attributes if name.startswith("on") or name in ("src", "href")]
    assert f"turn 1{HOSTILE}" in seen.text and f"I prefer {HOSTILE}" in seen.text and f"# {HOSTILE}" in seen.text
    assert f"human = {HOSTILE}\ufffd" in seen.text and f"Run {whole_run.name}." in seen.text


def test_page_needs_no_network(page):
    assert not re.search(r"https?://|//[a-z]|@import|url\(", page.replace("http://www.w3.org/2000/svg", ""))
    assert "prefers-color-scheme" in page and "default-src 'none'" in page


def test_page_holds_every_section(page):
    assert "is not there" not in page
    assert page.count("<svg") == 7 and page.count("<polyline") > 14
    assert page.count("<article>") == 7  # six tasks by SWEET, one also by the base policy
    first, second = re.findall(r"<h3>(.*?)</h3>", page)[:2]
    assert (first, second) == ("SWEET: success", "base: failure")
    assert "passes 3 of" in page and "passes 0 of" in page


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
    article = page.split("<article>")[1]
    expected = [means[0][turn] - means[1][turn] for turn in (1, 2)]
    assert [float(x) for x in re.findall(r"<b>([+-][\d.]+)</b>", article)] == pytest.approx(expected, abs=0.006)
    assert re.findall(r"class='(up|down)'", article) == ["up" if value >= 0 else "down" for value in expected]


def test_initial_policy_from_elsewhere(whole_run, page, tmp_path):
    root = tmp_path / whole_run.name
    shutil.copytree(whole_run, root)
    shutil.move(root / "base", tmp_path / "mine")
    report.write(root, tmp_path / "out.html")
    without = (tmp_path / "out.html").read_text(encoding="utf-8")
    assert "<b>" not in without and "initial policy, for the advantages, is not there" in without
    write_json(root / "settings" / "critic.json", {"model": str(tmp_path / "mine")})
    report.write(root, tmp_path / "out.html")
    numbers = re.findall(r"<b>.*?</b>", page)
    assert re.findall(r"<b>.*?</b>", (tmp_path / "out.html").read_text(encoding="utf-8")) == numbers and numbers


def test_a_run_without_c_alone(whole_run, tmp_path):
    """Its curves, dialogues and advantages are shown, and only what was not run is said to be absent."""
    root, own = tmp_path / "run", tmp_path / "run" / "no-reference"
    for name in ("base", "critic", "actor"):
        shutil.copytree(whole_run / name, (root if name == "base" else own) / name)
    write_eval(own, {"SWEET without c": [0.0, 1.0, 0.0]})
    write_json(own / "settings" / "critic.json", {"critic.reference": False, "seed": 7})
    report.write(root, own / "report.html")
    page = (own / "report.html").read_text(encoding="utf-8")
    assert page.count("<article>") == 3 and page.count("SWEET without c: ") == 3 and page.count("<b>") >= 6
    assert "critic: loss, 40 steps" in page and "actor: loss, 30 steps" in page and "seed = 7" in page
    assert re.findall(r"python sweet.py (\w+)</code>", page) == ["credit", "multiturn", "rft"]


def test_all_tasks_alike_is_not_certainty(tmp_path):
    for rewards, said in (([0.0, 0.0, 0.0], True), ([0.0, 1.0, 0.0], False)):
        write_eval(tmp_path / str(said), {"base": rewards})
        assert ("A bracket of no width" in report.results_table([tmp_path / str(said)])) is said


def test_missing_files_name_their_stage(tmp_path):
    (tmp_path / "run").mkdir()
    assert "python sweet.py eval" in report.results_table([tmp_path / "run"])
    report.write(tmp_path / "run", tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    for stage in ("eval", "credit", "critic", "actor", "multiturn", "rft", "base"):
        assert f"python sweet.py {stage}</code>" in page
    assert "<svg" not in page and "<article>" not in page


def test_training_that_blew_up_is_still_drawn(tmp_path):
    write_json(tmp_path / "rft" / "log.json", [{"loss": float("nan")}, {"loss": float("inf")}, {"loss": 1.0}])
    report.write(tmp_path, tmp_path / "report.html")
    assert "<polyline" in Path(tmp_path / "report.html").read_text(encoding="utf-8")
