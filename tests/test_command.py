"""The command line: flags, what a run remembers, status, --redo, bars, and what the end says."""
import dataclasses
import re

import pytest

import sweet as program
from machinery import folder, train


def main(*args):
    """The line that the program ends with, in this process; None where it ends well."""
    try:
        program.main([*map(str, args)])
    except SystemExit as end:
        return str(end.code)
    return None


def settings(*args):
    options = folder.recall(program.parser(), [*map(str, args)])
    return program.settings_of(options)


# ------------------------------------------------------------------ flags

@pytest.mark.parametrize("words, said", [
    ("--critic-lrr 1", "--critic-lrr 1: not known; perhaps --critic-lr; "),
    ("--critc_lr=1", "--critc_lr=1: not known; perhaps --critic-lr; "),
    ("--no-refrence", "--no-refrence: not known; perhaps --no-reference; "),
    ("--smok", "--smok: not known; perhaps --smoke; "),
    ("--critic-l 1", "--critic-l 1: not known; perhaps --critic-lr; "),  # an abbreviation of one flag is none
    ("--heldou f", "--heldou f: not known; perhaps --heldout; "),
    ("report more", "more: not known; "),
    ("stauts", "STAGE stauts: expected all or base or "),
    ("--seed x", "--seed 'x': expected a whole number"),
    ("--seed 1.5", "--seed '1.5': expected a whole number"),
    ("--critic-lr=much", "--critic-lr 'much': expected a number"),
    ("--seed", "--seed: expected a value"),
    ("--seed --smoke", "--seed: expected a value"),
    ("--task web", "--task web: expected backend or frontend"),
    ("--preset big", "--preset big: expected small or paper or one-gpu"),
    ("--eval-split all", "--eval-split all: expected dev or test"),
])
def test_a_typo_is_one_line_with_the_nearest_flag(words, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = main(*words.split())
    assert line.startswith(f"sweet: {said}") and "\n" not in line and "common." not in line
    assert not list(tmp_path.iterdir())


def test_help_fits_on_a_screen(capsys):
    assert main("--help") == "None"
    text = capsys.readouterr().out
    assert len(text.splitlines()) <= 40 and max(map(len, text.splitlines())) <= 100
    for stage in program.STAGES:
        assert re.search(rf"^    (.*, )?{stage}\b", text, re.M), stage
    assert set(re.findall(r"^    (--[\w-]+)  ", text, re.M)) <= {*program.parser().flags.values(), "--help-all"}
    assert len(re.findall(r"^    --", text, re.M)) <= 14


def test_help_all_has_every_flag_with_its_default_and_the_papers_value(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert main("report", "--help-all") in ("0", "None")
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for group, kind in program.GROUPS.items():
        for field in dataclasses.fields(kind):
            flag = train.flag_of(group, field)
            paper = train.PAPER.get(group, {}).get(field.name)
            said = f"(default {field.default!r}{'' if paper is None else f', paper {paper!r}'})"
            assert re.search(rf" {flag}[, ].*?(\(default .*)", text)[1].startswith(said), (flag, said)
    assert text.count("--critic-lr FLOAT") == 1 and "LR LR" not in text and "--seed INT, " not in text


PAPER = [
    ("critic", {"lr": 2e-7, "beta": 0.1, "nll": 0.01, "batch_size": 8, "epochs": 4, "normalize": "turn",
                "rank_against": "c", "reference": True}),
    ("actor", {"lr": 2e-7, "beta": 0.1, "nll": 0.01, "batch_size": 8, "epochs": 1}),
    ("rft", {"lr": 2e-7, "batch_size": 32, "epochs": 4}),
    ("multiturn", {"lr": 2e-7, "beta": 0.1, "nll": 0.01, "batch_size": 8, "epochs": 4}),
    ("rollout", {"tasks": 10000, "max_turns": 10}), ("eval", {"tasks": 1000}), ("candidates", {"n": 16}),
    ("pairs", {"margin": 0.0, "per_state": 4})]


@pytest.mark.parametrize("group, values", PAPER)
def test_the_papers_values(group, values, tmp_path):
    made = settings("--run", tmp_path, "--preset", "paper", "--critic-epochs", "2")[group]
    expected = {**values, "epochs": 2} if group == "critic" else values
    assert {name: getattr(made, name) for name in values} == expected


def test_every_field_has_a_docstring_and_settings_are_frozen():
    flags = program.parser()
    assert all(len(flags.texts[name]) > 5 for name in flags.places)
    for kind in program.GROUPS.values():
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(kind(), dataclasses.fields(kind)[0].name, 1)
