"""TRL: the exported tasks in its self-distillation trainer, and two steps of GRPO on the dialogue as an environment."""
import json
import re
from pathlib import Path

import pytest
import torch
from conftest import byte_tokenizer, tiny_llama

import sweet as program
from adapters.trl import OVER, TEACHER_PROMPT, ColBench, environment, export
from env import INSTRUCTIONS, render
from machinery.files import InputError
from simulator import Human
from worlds import backend as world

pytestmark = pytest.mark.slow
trl = pytest.importorskip("trl", reason="needs pip install trl")
datasets = pytest.importorskip("datasets", reason="needs pip install trl")

CONTROL = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")


@pytest.fixture
def run(tmp_path):
    return program.open_run(["--run", str(tmp_path / "run"), "--rollout-tasks", "3"])


@pytest.fixture
def chat():
    """A byte-level tokenizer with Qwen 3's template, which TRL knows how to read tool calls from."""
    template = (Path(trl.__file__).parent / "chat_templates/qwen3.jinja").read_text(encoding="utf-8")
    return byte_tokenizer(template, CONTROL, ("<think>", "</think>", "<tool_call>", "</tool_call>"),
                          eos="<|im_end|>", pad_token="<|endoftext|>")


def small(chat):
    model = tiny_llama(len(chat), spread=0.02)
    model.config.max_position_embeddings = 16384
    model.config.eos_token_id = model.generation_config.eos_token_id = chat.eos_token_id
    return model


def settings(kind, folder, **more):
    return kind(str(folder), use_cpu=True, report_to="none", bf16=False, gradient_checkpointing=False, logging_steps=1,
                max_steps=2, num_generations=2, per_device_train_batch_size=2, learning_rate=1e-2, disable_tqdm=True,
                save_strategy="no", **more)


def test_the_tasks_of_a_run(run, capsys):
    path = export(run)
    assert f"3 tasks for TRL: {path}" in capsys.readouterr().out
    rows = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=str(run.root / "cache"))
    assert rows.column_names == ["prompt", "privileged_context", "task"]
    for row, task in zip(rows, world.make_tasks(3, 0), strict=True):
        instructions = INSTRUCTIONS.replace("{max_turns}", "4")
        assert row["prompt"] == [{"role": "user", "content": instructions + task.problem_description}]
        assert row["privileged_context"] == task.ground_truth and json.loads(row["task"]) == task.to_record()


def test_a_teacher_of_self_distillation_reads_what_the_critic_reads(run, chat, tmp_path):
    from trl.experimental.sdft import SDFTConfig, SDFTTrainer
    rows = datasets.load_dataset("json", data_files=str(export(run)), split="train", cache_dir=str(tmp_path / "cache"))
    args = settings(SDFTConfig, tmp_path, max_completion_length=4, teacher_prompt_template=TEACHER_PROMPT,
                    teacher_model_kind="live")
    trainer = SDFTTrainer(small(chat), args=args, train_dataset=rows, processing_class=chat)
    prompt, = trainer.teacher_context_builder.select_generation_prompts(
        rows["prompt"][:1], rows["privileged_context"][:1])
    ids = chat.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True, return_dict=False)
    ours, _ = render(chat, rows[0]["prompt"], rows[0]["privileged_context"])
    assert ours[:len(ids)] == ids  # ours goes on with an empty thought, as written turns do
    before = [weight.clone() for weight in trainer.model.parameters()]
    trainer.train()
    assert trainer.state.global_step == 2
    assert any(not torch.equal(*pair) for pair in zip(before, trainer.model.parameters()))


# ------------------------------------------------------------------ the environment

def begun(run, row=0):
    one = environment(run)()
    assert type(one) is ColBench
    text = one.reset(**json.loads(export(run).read_text().splitlines()[row]))
    return one, text


def test_the_dialogue_by_hand(run):
    task, = world.make_tasks(1, 0)
    one, text = begun(run)
    assert "4 calls at most" in text and text.endswith(task.problem_description)
    step, = [s for s in world.read_function(task.ground_truth) if s not in world.known_steps(one.dialogue.messages)][:1]
    reply = one.ask(f"For the list{world.STEPS[step].ask}")
    assert world.STEPS[step].values[world.read_function(task.ground_truth)[step]][0] in reply
    assert one.get_reward() == 0.0  # without an answer
    assert one.answer(task.ground_truth) == OVER and one.get_reward() == 1.0
    with pytest.raises(ValueError, match="over"):
        one.ask("And now?")
    assert one.get_reward() == 1.0
    one.reset(task=json.dumps(task.to_record()))
    for _ in range(4):  # the fourth turn is the last: it is graded as it is
        said = one.ask("What?")
    assert said == OVER and one.dialogue.answer == "What?" and one.get_reward() == 0.0


def test_a_human_who_leaves_ends_the_training(run):
    class Gone(Human):
        def reply(self, tasks, dialogues):
            return [None] * len(tasks)
    one, _ = begun(run)
    one.human = Gone()
    assert one.ask("Which?") == OVER
    with pytest.raises(ValueError, match="over"):
        one.answer("def f(): pass")
    with pytest.raises(InputError, match="the human does not reply"):
        one.get_reward()


def test_two_steps_of_grpo(run, chat, tmp_path):
    """One of two rollouts asks, then answers with the reference; the other answers at once, and wrongly."""
    path, model = export(run), small(chat)
    references = {task.problem_description: task.ground_truth for task in world.make_tasks(3, 0)}

    def call(name, **arguments):
        return f'<tool_call>\n{json.dumps({"name": name, "arguments": arguments})}\n</tool_call><|im_end|>'

    def speak(prompt, row):
        replies = re.findall("<tool_response>\n(.*?)\n</tool_response>", prompt, re.S)
        if not replies:
            return call("ask", question=f"For the list{world.STEPS[0].ask}") if row == 0 else call("answer", result="?")
        if replies[-1] == OVER:
            return "Done.<|im_end|>"
        reference, = [source for request, source in references.items() if request in prompt]
        return call("answer", result=reference)

    def generate(input_ids, **_):
        turns = []
        for row, ids in enumerate(input_ids):
            turns.append(torch.tensor(chat(speak(chat.decode(ids), row), add_special_tokens=False).input_ids))
        turns = torch.nn.utils.rnn.pad_sequence(turns, batch_first=True, padding_value=chat.pad_token_id)
        return torch.cat([input_ids, turns], 1)
    model.generate = generate  # what a model that has learned to call tools would sample
    rows = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    args = settings(trl.GRPOConfig, tmp_path, max_completion_length=4000)
    trainer = trl.GRPOTrainer(model, args=args, train_dataset=rows.remove_columns("prompt"), processing_class=chat,
                              environment_factory=environment(run))
    before = [weight.clone() for weight in model.parameters()]
    trainer.train()
    steps = [log for log in trainer.state.log_history if "reward" in log]
    assert len(steps) == 2
    for log in steps:
        assert log["rewards/ColBench/mean"] == 0.5 and log["tools/failure_frequency"] == 0
        assert log["tools/call_frequency"] == 1.5 and log["grad_norm"] > 0
    assert any(not torch.equal(*pair) for pair in zip(before, model.parameters()))
    asked, wrong = [one.dialogue for one in trainer.environments]
    assert asked.turns == 2 and asked.answer == asked.task.ground_truth and wrong.answer == "?"
    assert world.asked_step(asked.messages[1]["content"]) == 0 and asked.messages[2]["role"] == "user"
