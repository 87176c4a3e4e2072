"""One small run of everything, seen from outside: `datasets` opens its files, its models have cards, and the tracker
has what the logs have. Its base has hardly learned, so rewards are written into its dialogues by hand."""
import json
import math
from types import SimpleNamespace

import pytest
from huggingface_hub import ModelCard

import play
import sweet as program
from adapters import cards
from machinery.files import read_lines, write_lines
from studies import best_of_n

pytestmark = pytest.mark.slow

SMALL = ["--base-documents", "64", "--base-epochs", "1", "--rollout-tasks", "4", "--rollout-per-task", "2",
         "--rollout-max-tokens", "12", "--critic-epochs", "1", "--candidates-states", "8", "--candidates-n", "4",
         "--actor-epochs", "1", "--rft-epochs", "1", "--multiturn-epochs", "1", "--eval-tasks", "3",
         "--credit-states", "3", "--credit-monte-carlo-states", "1", "--credit-monte-carlo-rollouts", "1"]
MODELS = ["base", "critic", "actor", "rft", "multiturn"]
FILES = ["best-of-n", "candidates", "credit", "eval", "pairs", "plays", "samples", "trajectories"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    pytest.importorskip("tensorboard")
    folder = tmp_path_factory.mktemp("runs") / "small"
    program.main(["rollout", "--run", str(folder), *SMALL, "--track", "tensorboard"])
    rows = list(read_lines(folder / "trajectories.jsonl"))
    for i, row in enumerate(rows):
        row["reward"] = float(i % 2)
    write_lines(folder / "trajectories.jsonl", rows)
    program.main(["actor", "--run", str(folder)])
    before = {name: (folder / name / "README.md").read_text() for name in ("base", "critic", "actor")}
    program.main(["--run", str(folder)])
    evaluated(folder)
    run = program.open_run(["--run", str(folder)])
    best_of_n.play(run, numbers=(1, 2))
    dialogue = play.Dialogue(run, run.model, run.held_out(), "actor", 1)
    while dialogue.record is None:
        dialogue.reply("I do not mind.")
    return SimpleNamespace(folder=folder, run=run, before=before)


def evaluated(folder):
    """Write rewards by hand into eval.jsonl, too; the next report puts them into the cards."""
    rows = list(read_lines(folder / "eval.jsonl"))
    for i, row in enumerate(rows):
        row["reward"] = float(i * 7 % 5 < 2)
    write_lines(folder / "eval.jsonl", rows)
    program.main(["--run", str(folder)])


# ------------------------------------------------------------------ datasets

def same(row, record):
    """Whether a row of a table is a record: it has the fields of all, null where this record has none. datasets keeps
    ten decimals of a number where it packs some fields as JSON."""
    if isinstance(row, dict):
        return row.keys() >= record.keys() and all(same(value, record.get(name)) for name, value in row.items())
    if isinstance(row, list):
        return len(row) == len(record) and all(map(same, row, record))
    return math.isclose(row, record, abs_tol=1e-9) if isinstance(row, float) else row == record


@pytest.mark.parametrize("share", [1, 2 / 3])
@pytest.mark.parametrize("name", FILES)
def test_datasets_opens_every_file(whole, tmp_path, name, share):
    """In two chunks, too, as files of over 10 MB are read: the second has to fit the types of the first."""
    datasets = pytest.importorskip("datasets")
    assert sorted(path.stem for path in whole.folder.glob("*.jsonl")) == FILES
    file = whole.folder / f"{name}.jsonl"
    chunksize = int(share * file.stat().st_size)
    found = datasets.load_dataset("json", data_files=str(file), split="train", cache_dir=str(tmp_path),
                                  chunksize=chunksize)
    assert same(found.to_list(), list(read_lines(file)))


# ------------------------------------------------------------------ cards

def test_every_model_has_a_card_that_the_hub_reads(whole):
    assert cards.models(whole.run) == MODELS
    for name in MODELS:
        card = ModelCard.load(whole.folder / name / "README.md")
        assert card.data.library_name == "transformers" and card.data.pipeline_tag == "text-generation"
        assert {"sweet-rl", "colbench", name} <= set(card.data.tags) and card.data.base_model is None
        settings = json.loads((whole.folder / f"settings/{name}.json").read_text())
        rows = [row.strip("| ").split("|") for row in card.text.splitlines() if row.startswith("| ")]
        said = {row[0].strip(): row[1].strip() for row in rows if len(row) == 2}
        given = {setting: str(value) for setting, value in settings.items() if value not in (None, "")}
        assert given.items() <= said.items() and len(given) > 5
        log = json.loads((whole.folder / name / "log.json").read_text())
        assert f"{len(log)} steps" in card.text and f"{log[-1]['loss']:.3f} at the last" in card.text


def test_figures_come_with_the_evaluation(whole):
    """The means, taken anew from eval.jsonl; before, there were none."""
    records = list(read_lines(whole.folder / "eval.jsonl"))
    for name, method in program.METHODS.items():
        scores = {result.metric_name: result.metric_value
                  for result in ModelCard.load(whole.folder / name / "README.md").data.eval_results}
        for top_p, way in ((1.0, "T=1"), (0.9, "top-p 0.9")):
            won = [r["reward"] == 1 for r in records if r["method"] == method and r["top_p"] == top_p]
            assert len(won) == 3 and scores.pop(f"success %, {way}") == round(100 * sum(won) / 3, 1)
        assert scores == {}
    assert len({record["reward"] for record in records}) == 2
    for name, text in whole.before.items():
        assert "## Figures" not in text and "model-index" not in text
        assert "## Figures" in (whole.folder / name / "README.md").read_text()


def test_a_card_is_written_only_when_it_says_something_else(whole):
    files = [whole.folder / name / "README.md" for name in MODELS]
    times = [file.stat().st_mtime_ns for file in files]
    program.main(["--run", str(whole.folder)])  # makes the report anew
    assert [file.stat().st_mtime_ns for file in files] == times
    text = files[0].read_text()
    files[0].write_text("older")
    program.main(["--run", str(whole.folder)])
    assert files[0].read_text() == text and [file.stat().st_mtime_ns for file in files[1:]] == times[1:]


def test_the_base_model_is_named_as_the_hub_knows_it(tmp_path):
    def named(model):
        return cards.base_model(SimpleNamespace(given=SimpleNamespace(model=model)))
    assert named("owner/model") == "owner/model"
    assert named(str(tmp_path)) is None and named("") is None


# ------------------------------------------------------------------ the tracker of this run

def test_the_tracker_has_what_the_bars_showed(whole):
    """Steps as log.json has them, rewards a group, the table at the end; one run of the tracker for three commands."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    folder, = (whole.folder / "tensorboard").iterdir()
    events = EventAccumulator(str(folder)).Reload()
    for name in MODELS:
        log = json.loads((whole.folder / name / "log.json").read_text())
        for figure in log[0]:
            rows = [(event.step, event.value) for event in events.Scalars(f"{name}/{figure}")]
            assert [step for step, _ in rows] == list(range(1, len(log) + 1))
            assert all(math.isclose(value, row[figure], rel_tol=1e-5, abs_tol=1e-7)
                       for (_, value), row in zip(rows, log))
    assert [event.step for event in events.Scalars("rollout/reward")] == [8]
    assert len(events.Scalars("eval/reward")) == 24 // 3
    text, = (event.tensor_proto.string_val[0].decode() for event in events.Tensors("results/text_summary"))
    assert all(f"| {method} " in text for method in program.METHODS.values()) and "3 held-out tasks" in text
