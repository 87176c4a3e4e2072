"""The small world with a pretrained model: --model and --base-documents (sweet.stage_base)."""
import functools
import json

import pytest
import torch
from conftest import needs_peft, save_model

import actor
import report
import sweet as program
from env import REFERENCE_PREFIX
from machinery.files import InputError
from machinery.start import stages_to_do
from machinery.train import Machine, fit, load_model
from worlds import World
from worlds.backend import Backend, known_steps, read_function
from worlds.blind import Blind


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("pretrained") / "model", seed=3)


def words(stage, run, model, *more):
    return [stage, "--run", str(run), "--model", model, *more]


TUNED = ("--base-documents", "9", "--base-batch-size", "2", "--base-epochs", "1")


def opened(*argv):
    return program.open_run(list(argv))


def asked_about_c(messages):
    """Of each question, whether the human had something to say: whether it was about a step that c has."""
    return [bool(known_steps([message])) for message in messages[2::2]]


def answered_untold(messages):
    """Whether the answer has a step that the human never told."""
    return [not read_function(messages[-1]["content"]).keys() <= known_steps(messages).keys()]


@pytest.mark.parametrize("world, share_of, bound", [(Backend(), asked_about_c, 0.5), (Blind(), answered_untold, 0.3)])
def test_what_it_is_tuned_on_never_saw_the_reference(world, share_of, bound):
    """The demonstrator who reads c asks mostly about steps that c has; who does not hits them by chance (c has three of
    six). In the blind world nobody's questions show c, but answers do: who reads it has steps that were never told."""
    def share(documents):
        seen = [hit for messages, _ in documents for hit in share_of(messages)]
        return sum(seen) / len(seen)
    found = world.documents_without_c(400, seed=3)
    assert len(found) == 400 and all(reference is None for _, reference in found)
    everything = world.documents(1616, seed=3)
    assert found == [one for one in everything if one[1] is None][:400]
    text = REFERENCE_PREFIX.split("{reference}")[0]
    assert not any(text in message["content"] for messages, _ in found for message in messages)
    assert share(found) < bound < share([one for one in everything if one[1] is not None])


def test_a_world_that_always_shows_it():
    class Shows(World):
        def documents(self, n, seed):
            return [([], "c")] * n
    with pytest.raises(InputError, match="--base-documents 2: "):
        Shows().documents_without_c(2, 0)


def test_the_base_is_the_model_tuned(pretrained, tmp_path, monkeypatch, capsys):
    seen = []

    def watched(model, views, *how, **more):
        seen.extend(views)
        return original(model, views, *how, **more)
    original = actor.train_imitation
    monkeypatch.setattr(actor, "train_imitation", watched)
    run = tmp_path / "run"
    program.main(words("base", run, pretrained, *TUNED, "--base-lr", "1e-3"))
    (before, tokenizer), (after, _) = load_model(pretrained), load_model(run / "base")
    assert before.config.vocab_size == after.config.vocab_size
    assert any(not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters()))
    assert len(json.loads((run / "base/log.json").read_text())) == 5  # 9 documents, 2 a step
    wanted = [messages for messages, _ in Backend().documents_without_c(9, 0)]
    for (input_ids, turn_ids), messages in zip(seen, wanted, strict=True):
        text = tokenizer.decode(input_ids)
        assert all(message["content"] in text for message in messages)
        assert REFERENCE_PREFIX.split("{reference}")[0] not in text
        assert max(turn_ids) == len(messages) // 2
    longest = max(turn_ids.count(turn) for _, turn_ids in seen for turn in set(turn_ids) - {0})
    said = capsys.readouterr().err
    assert f"up to {longest} tokens: --rollout-max-tokens 48 cuts" in said  # one a byte: an answer takes more
    made = json.loads((run / "settings/base.json").read_text())
    assert made["base.documents"] == 9 and made["base.lr"] == 1e-3 and made["model"] == pretrained
    assert made["lora"] == 0 and made["dtype"] == "float32"
    # everything else begins there, of a later command without flags, too
    later = opened("critic", "--run", str(run))
    for model in (later.model("base")[0], report.RunFolder(run).model("base")[0]):
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), after.parameters()))


def test_it_goes_on_where_it_was_stopped(pretrained, tmp_path, monkeypatch):
    steps = []

    def stops(model, views, batch=None):
        steps.append(len(views))
        if len(steps) == 3:
            raise InputError("stopped")
        return whole(model, views, batch)
    whole = actor.imitation_loss
    monkeypatch.setattr(actor, "fit", functools.partial(fit, checkpoint_seconds=0.0))
    program.main(words("base", tmp_path / "whole", pretrained, *TUNED))
    monkeypatch.setattr(actor, "imitation_loss", stops)
    with pytest.raises(SystemExit, match="stopped"):
        program.main(words("base", tmp_path / "run", pretrained, *TUNED))
    assert (tmp_path / "run/base.partial/checkpoint.pt").exists() and not (tmp_path / "run/base").exists()
    program.main(["base", "--run", str(tmp_path / "run")])
    assert len(steps) == 6  # the third step anew, and two more
    for name in ("model.safetensors", "log.json"):
        assert (tmp_path / "run/base" / name).read_bytes() == (tmp_path / "whole/base" / name).read_bytes()


def test_adapters_learn_and_go_on_learning(pretrained, tmp_path):
    needs_peft()
    run = tmp_path / "run"
    program.main(words("base", run, pretrained, *TUNED, "--lora", "2"))
    assert (run / "base/adapter_config.json").exists()
    model, _ = opened("critic", "--run", str(run)).model("base", train=True)
    learning = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert learning and all("lora_" in name for name in learning)


def test_bfloat16_sums_steps_that_it_could_not_see(pretrained, tmp_path):
    """At this rate no single step moves a weight of bfloat16; the float32 weights of the optimizer add them up."""
    program.main(words("base", tmp_path / "run", pretrained, "--base-documents", "60", "--base-batch-size", "1",
                       "--base-lr", "1e-4", "--dtype", "bfloat16"))
    short = Machine(dtype="bfloat16")
    before, after = (
        dict(load_model(path, short)[0].named_parameters()) for path in (pretrained, tmp_path / "run/base"))
    assert {weight.dtype for weight in after.values()} == {torch.bfloat16}
    name = "model.norm.weight"  # all ones, where a step of 1e-4 is a fortieth of the spacing
    assert (after[name] != before[name]).any()


def test_without_documents_the_model_is_the_base(pretrained, tmp_path):
    for more in ((), ("--base-documents", "0")):
        run = opened(*words("rollout", tmp_path / "run", pretrained, *more))
        assert run.initial == pretrained and run.outputs("base") == []
        assert stages_to_do(run, run.stages, "rollout") == {"rollout"}
    program.main(words("rollout", tmp_path / "run", pretrained, "--rollout-tasks", "1", "--rollout-per-task", "1",
                       "--rollout-max-turns", "1", "--rollout-max-tokens", "2"))
    assert not (tmp_path / "run/base").exists()
    made = json.loads((tmp_path / "run/settings/rollout.json").read_text())
    assert not any(name.startswith("base.") for name in made)
    for documents in ("9", "16000"):  # the second is what a small world has without a flag
        with pytest.raises(SystemExit, match=f"base.documents = 0, now it is {documents}"):
            program.main(["rollout", "--run", str(tmp_path / "run"), "--base-documents", documents])


def test_a_tuned_base_is_not_passed_over(pretrained, tmp_path):
    run = tmp_path / "run"
    program.main(words("base", run, pretrained, *TUNED))
    (run / "trajectories.jsonl").write_text("{}")
    (run / "settings/rollout.json").write_text((run / "settings/base.json").read_text())
    with pytest.raises(SystemExit, match="base.documents = 9, now it is 0"):
        program.main(["rollout", "--run", str(run), "--base-documents", "0"])
    with pytest.raises(SystemExit, match="--base-documents 0: without --model"):
        program.main(["base", "--run", str(tmp_path / "other"), "--base-documents", "0"])
