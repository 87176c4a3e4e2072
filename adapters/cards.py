"""Model cards: each model of a run says what it is, how it was trained, and how well it does.

A card is README.md in the model's folder, with the block of metadata that the Hugging Face hub reads. It is written
when the stage is finished, and again once there are figures (eval, credit) to put into it. It
depends on the run's files alone, so the same run has the same cards.

Exercised by `python -m pytest tests/test_adapters_cards.py`.
"""
import os
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from machinery.bootstrap import interval
from machinery.files import put_text, read_json
from machinery.folder import peek
from studies.results import CREDIT, bracketed, credit_cells, decoding, evaluations, markdown, summarise

PAPER = "[SWEET-RL](https://arxiv.org/abs/2503.15478)"
ABOUT = {  # stage: what its model is
    "base": "The initial policy: it asks and answers as the demonstrator of a small world does.",
    "critic": f"The critic of {PAPER}: a language model that reads the reference solution in front of a dialogue. How "
              "much likelier it makes a turn than the initial policy does, per token, is its advantage (Eq. 3).",
    "actor": f"The agent trained by {PAPER}: it asks a person about a vague request, then answers. It learned by DPO "
             "from pairs of single turns that the critic ranked (Eq. 4).",
    "rft": f"A baseline of {PAPER}: rejection-sampling fine-tuning, imitation of the successful dialogues.",
    "multiturn": f"A baseline of {PAPER}: DPO on whole dialogues, the better against the worse of one task.",
}
TAGS = ["sweet-rl", "colbench"]


def models(run):
    """The stages of a run that have left a model."""
    found = []
    for stage in ABOUT:
        folder = run.path(stage)
        if run.outputs(stage) and (is_adapters(folder) or (folder / "config.json").exists()):
            found.append(stage)
    return found


def is_adapters(folder):
    return (folder / "adapter_config.json").exists()


def write(run, stage, folder, figures):
    """README.md of a stage's model in a folder, unless it says the same already. figures: as `measured` has them."""
    text, file = card(run, stage, folder, figures), folder / "README.md"
    if not file.exists() or file.read_text(encoding="utf-8") != text:
        put_text(file, text)


# ------------------------------------------------------------------ figures

def measured(run):
    """{(method, decoding): (mean, low, high) of the world's figure in %}, its name, and the number of tasks."""
    means, sizes = summarise([evaluations(run.root)], run.world)
    figure, _ = run.world.headers(run.record.values)
    found = {}
    for (method, top_p), mean_R3 in means.items():
        found[method, decoding(top_p)] = interval(mean_R3[:, 0])
    return found, figure, sum(sizes)


def results(figures):
    """(header, rows, Markdown) of the results of all methods."""
    found, figure, n = figures
    methods = dict.fromkeys(method for method, _ in found)
    ways = dict.fromkeys(way for _, way in found)
    header = ["method", *(f"{figure} %, {way}" for way in ways)]
    rows = [[method, *(bracketed(found[method, way]) for way in ways)] for method in methods]
    return header, rows, markdown(f"{n} held-out tasks; brackets: 95 % intervals.", header, rows)


# ------------------------------------------------------------------ the card

def card(run, stage, folder, figures):
    """The text of a model's card."""
    found, figure, n = figures
    name = run.methods.get(stage, stage)
    mine = {way: value for (method, way), value in found.items() if method == name}
    parts = [f"# {name}", about(run, stage, folder), training(run, stage)]
    if mine:
        rows = [[way, bracketed(value)] for way, value in mine.items()]
        said = f"{n} held-out tasks of the run that made this model; brackets: 95 % intervals."
        parts += ["## Figures", markdown(said, ["decoding", f"{figure} %"], rows)]
    credit = peek(run.path("credit.json"))
    if stage == "critic" and credit:
        kinds = [" ".join((kind.replace("_", " "), value)) for kind, value, _ in CREDIT]
        rows = [*zip(kinds, credit_cells([credit]))]
        parts += ["## Figures", markdown("How often it is right; 0.5: guessing.", ["turns", "held-out tasks"], rows)]
    data = metadata(run, stage, folder, mine, figure)
    text = "\n\n".join(parts)
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n{text}\n"))


def metadata(run, stage, folder, mine, figure):
    """The block in front of a card. mine: {way of decoding: (mean, low, high)}."""
    dataset = Path(run.given.heldout or run.given.tasks or run.options.task).name
    scores = []
    for way, (mean, _, _) in mine.items():
        scores.append(EvalResult(
            task_type="text-generation",
            dataset_type="colbench",
            dataset_name=f"ColBench: {dataset}",
            metric_type="accuracy",
            metric_name=f"{figure} %, {way}",
            metric_value=round(float(mean), 1)))
    return ModelCardData(
        library_name="peft" if is_adapters(folder) else "transformers",
        pipeline_tag="text-generation",
        tags=[*TAGS, stage],
        base_model=base_model(run),
        model_name=f"sweet-{stage}",
        eval_results=scores or None)


def base_model(run):
    """The hub's name of the model that the run began with; None where it was a folder or file, or the run's own."""
    model = run.given.model
    return None if not model or os.path.exists(model) else model


def about(run, stage, folder):
    """What the model is, and how to load it."""
    settings = run.settings
    text = [ABOUT[stage]]
    kind = settings["critic"].kind
    if kind != "bradley-terry" and stage in ("critic", "actor"):
        text.append(f"Another critic than the paper's was used: {kind}.")
    if run.options.smoke:
        text.append("It was made in miniature (--smoke): its numbers mean nothing.")
    begun = base_model(run) or Path(run.given.model).name
    text.append(f"It began as {begun}." if begun else f"It began as a small model of the world {run.options.task}.")
    if is_adapters(folder):
        text.append("These are LoRA adapters, to be loaded on the model that adapter_config.json names; `python "
                    "sweet.py export merged` writes them into plain weights.")
    return " ".join(text)


def training(run, stage):
    """How it was trained: the course of the loss, the code, and all settings."""
    folder = run.path(stage).parent
    log = read_json(run.path(stage) / "log.json", [])
    made = peek(folder / "made.json").get(stage)
    settings = peek(folder / f"settings/{stage}.json")
    rows = []
    for name, value in settings.items():
        if value in (None, ""):  # not given
            continue
        local = isinstance(value, str) and os.path.isabs(value)
        rows.append([name, Path(value).name if local else str(value)])
    text = ["## Training"]
    if log:
        text.append(f"{len(log)} steps of AdamW; loss {log[0]['loss']:.3f} at the first, {log[-1]['loss']:.3f} at the "
                    "last. log.json has every step.")
    if made:
        text.append(f"Code: commit {made['commit']}; {made['versions']}.")
    text.append(markdown("What this model and the files that it was made from depend on.", ["setting", "value"], rows))
    return "\n\n".join(text)
