"""The small world: its tasks, its human, its tokenizer, and what the base policy could have learned."""
import math
import random
from collections import Counter

import pytest

from env import ANSWER_MARKER, INSTRUCTIONS, REFERENCE_PREFIX, grade, render
from simulator import ScriptedHuman, make_human
from worlds import backend as world


def hidden(task):
    """(topic, {step: value}) of a task, read from its source by looking for each written line."""
    topic = task.ground_truth.split("def tidy_")[1].split("(")[0]
    values = {}
    for step, spec in enumerate(world.STEPS):
        for value, (_, written) in enumerate(spec.values):
            if f"\n    {spec.before}{written}{spec.after}\n" in task.ground_truth:
                values[step] = value
    return topic, values


# ------------------------------------------------------------------ tasks

def test_the_splits_are_disjoint_for_several_seeds():
    sources = {split: {task.ground_truth for seed in range(4) for task in world.make_tasks(150, seed, split)}
               for split in ("train", "dev", "test")}
    assert all(len(found) > 200 for found in sources.values())
    assert not sources["train"] & sources["dev"]
    assert not sources["train"] & sources["test"]
    assert not sources["dev"] & sources["test"]


def test_same_seed_same_tasks():
    first = world.make_tasks(40, 3, "dev")
    assert first == world.make_tasks(40, 3, "dev") and first != world.make_tasks(40, 4, "dev")
    assert len({task.ground_truth for task in first}) == 40
    assert world.make_tasks(10, 3, "dev") == first[:10]


@pytest.mark.slow
def test_more_tasks_than_a_split_holds():
    """One topic has 64 functions, shared out among three splits."""
    tides = {"tides": world.TOPIC_STEPS["tides"]}
    assert len(world.make_tasks(5, 0, "dev", tides)) == 5
    with pytest.raises(ValueError, match="dev"):
        world.make_tasks(60, 0, "dev", tides)


def test_a_task_is_a_colbench_record_without_what_is_hidden():
    for task in world.make_tasks(60, 1):
        topic, values = hidden(task)
        assert tuple(sorted(values)) == world.TOPIC_STEPS[topic] and len(values) == world.RELEVANT
        assert world.read_function(task.ground_truth) == values
        assert task.ground_truth == world.write_function(topic, values)
        assert f"The signature of the function is: def tidy_{topic}(values)" in task.problem_description
        assert len(task.test_cases) == 10 and all(call.startswith(f"tidy_{topic}([")
                                                  for call in task.test_cases.values())
        said = world.known_steps([{"role": "user", "content": task.problem_description}])
        assert all(values[step] == value for step, value in said.items())
        names = {"__name__": "test"}
        exec(task.ground_truth, names)
        assert all(isinstance(eval(call, names), list) for call in task.test_cases.values())


def test_requests_reveal_some_steps_and_not_others():
    tasks = world.make_tasks(300, 2)
    shown = [len(world.known_steps([{"role": "user", "content": task.problem_description}])) for task in tasks]
    share, n = sum(shown) / (300 * world.RELEVANT), 300 * world.RELEVANT
    assert abs(share - world.P_REVEALED) < 5 * math.sqrt(world.P_REVEALED * (1 - world.P_REVEALED) / n)


def test_references_get_the_reward_and_other_functions_rarely_do():
    """Every reference 1.0. One step changed, dropped or added: caught by the ten calls in at least 97 of 100."""
    tasks, rng = world.make_tasks(100, 6), random.Random(0)
    assert grade([task.ground_truth for task in tasks], tasks) == [1.0] * 100
    fenced = [f"Sure.\n```python\n{task.ground_truth}\n```" for task in tasks]
    assert grade(fenced, tasks) == [1.0] * 100
    for kind in ("changed", "dropped", "added"):
        answers = []
        for task in tasks:
            topic, values = hidden(task)
            step = rng.choice(sorted(values))
            if kind == "changed":
                values[step] = (values[step] + rng.randint(1, 3)) % 4
            elif kind == "dropped":
                del values[step]
            else:
                values[rng.choice([s for s in range(len(world.STEPS)) if s not in values])] = rng.randrange(4)
            answers.append(world.write_function(topic, values))
        rewards = grade(answers, tasks)
        assert sum(reward == 1.0 for reward in rewards) <= 3, kind
        assert all(0.0 <= reward <= 1.0 for reward in rewards)


# ------------------------------------------------------------------ the human

def dialogue_about(task, *questions):
    """The dialogue that these questions make, with the scripted human's replies."""
    human, messages = ScriptedHuman(world.respond, seed=1), [{"role": "user", "content": task.problem_description}]
    for question in questions:
        messages.append({"role": "assistant", "content": question})
        messages.append({"role": "user", "content": human.reply([task], [messages])[0]})
    return messages


def test_the_human_answers_from_the_solution():
    """Asked about a step that the solution has: its wish, in words. About another: no preference. No code, ever."""
    no_wish, wishes = Counter(), Counter()
    for task in world.make_tasks(40, 8):
        topic, values = hidden(task)
        for step, spec in enumerate(world.STEPS):
            for stem in world.STEMS[:2]:
                reply = dialogue_about(task, f"{stem}{topic}{spec.ask}")[-1]["content"]
                if step in values:
                    said = [v for v in range(4) if spec.values[v][0] in reply]
                    assert said == [values[step]]
                    wishes[reply.split(spec.values[values[step]][0])[0]] += 1
                else:
                    assert reply in world.NO_PREFERENCE
                    no_wish[reply] += 1
                written = [text for s in world.STEPS for _, text in s.values] + ["values", "def ", "return values"]
                assert not any(text in reply for text in written)
    assert len(no_wish) == len(world.NO_PREFERENCE) and len(wishes) == len(world.CONSENT)


def test_the_human_does_not_understand_everything():
    task = world.make_tasks(1, 0)[0]
    assert dialogue_about(task, "What is the weather?")[-1]["content"] in world.CONFUSED
    assert dialogue_about(task, "")[-1]["content"] in world.CONFUSED


def test_the_human_says_when_the_last_turn_has_come():
    task = world.make_tasks(1, 0)[0]
    questions = [f"For the tides{spec.ask}" for spec in world.STEPS]
    replies = [m["content"] for m in dialogue_about(task, *questions[:world.MAX_TURNS - 1])[2::2]]
    assert [reply.endswith(world.LAST_WORDS) for reply in replies] == [False] * (world.MAX_TURNS - 2) + [True]


def test_the_human_is_deterministic_whatever_the_order():
    tasks = world.make_tasks(30, 9)
    questions = [f"As to it{world.STEPS[i % 6].ask}" for i in range(30)]
    dialogues = [[{"role": "user", "content": task.problem_description}, {"role": "assistant", "content": question}]
                 for task, question in zip(tasks, questions)]
    replies = make_human("scripted", world.respond, 4).reply(tasks, dialogues)
    human = ScriptedHuman(world.respond, 4)
    assert human.reply(tasks[::-1], dialogues[::-1])[::-1] == replies
    assert [human.reply([t], [d])[0] for t, d in zip(tasks, dialogues)] == replies
    assert ScriptedHuman(world.respond, 5).reply(tasks, dialogues) != replies


def test_the_human_reads_hidden_information_where_a_task_has_it():
    task = world.make_tasks(1, 0)[0]
    topic, values = hidden(task)
    step = sorted(values)[0]
    other = world.write_function(topic, {step: (values[step] + 1) % 4})
    task = type(task)(task.problem_description, task.ground_truth, task.test_cases, {"hidden_information": other})
    reply = dialogue_about(task, f"For it{world.STEPS[step].ask}")[-1]["content"]
    assert world.STEPS[step].values[(values[step] + 1) % 4][0] in reply


# ------------------------------------------------------------------ labels

def test_labels_of_hand_made_dialogues():
    values = {step: 1 for step in world.TOPIC_STEPS["tides"]}
    source = world.write_function("tides", values)
    task = world.Task("Tidy the tides.", source)
    inside, outside = world.TOPIC_STEPS["tides"][0], next(s for s in range(6) if s not in values)
    start = [{"role": "user", "content": task.problem_description}]
    question = f"For the tides{world.STEPS[inside].ask}"
    assert world.judge(task, start, question) == ("question", True)
    assert world.judge(task, start, f"For the tides{world.STEPS[outside].ask}") == ("question", False)
    told = [{"role": "user", "content": f"Tidy them. Please make sure to {world.STEPS[inside].values[1][0]}."}]
    assert world.judge(task, told, question) == ("question", False)
    again = start + [{"role": "assistant", "content": question},
                     {"role": "user", "content": f"Yes, {world.STEPS[inside].values[1][0]}."}]
    assert world.judge(task, again, question) == ("question", False)
    assert world.known_steps(again) == {inside: 1}
    assert world.judge(task, start, f"{ANSWER_MARKER}\n{source}") == ("answer", True)
    assert world.judge(task, start, f"{ANSWER_MARKER}  {source}\n\n") == ("answer", True)
    wrong = world.write_function("tides", {**values, inside: 2})
    assert world.judge(task, start, f"{ANSWER_MARKER}\n{wrong}") == ("answer", False)
    assert world.judge(task, start, f"{question} {ANSWER_MARKER}\n{wrong}") == ("answer", False)
    assert world.judge(task, start, ANSWER_MARKER) == ("answer", False)
    assert world.judge(task, start, source) == ("other", False) == world.judge(task, start, "")


# ------------------------------------------------------------------ the tokenizer

def text_ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids


def test_every_phrase_is_one_token(tokenizer):
    assert all(len(text_ids(tokenizer, text)) == 1 for text in world.phrases())
    assert len({text_ids(tokenizer, text)[0] for text in world.phrases()}) == len(world.phrases())


def test_any_text_survives_the_tokenizer(tokenizer):
    rng = random.Random(0)
    texts = ["", " ", "  two  spaces ", "tabs\t\r\n\x00\x7f", "é e\u0301 漢字 😀 \u200b\ufeff", "n't . , ! 's",
             "\u2581x", "<|end|><|user|>", "I WANT TO ANSWER", "keep only the even onesdouble each one",
             "\ud7ff\ue000\U0010ffff"]
    texts += ["".join(chr(rng.choice([rng.randrange(32, 127), rng.randrange(0xd800), rng.randrange(0xe000, 0x110000)]))
                      for _ in range(rng.randint(1, 30))) for _ in range(200)]
    for text in texts:
        ids = text_ids(tokenizer, text)
        assert tokenizer.decode(ids) == text
        assert not set(ids) & set(tokenizer.all_special_ids)


def test_the_tokenizer_is_the_same_after_saving(tokenizer, tmp_path):
    from transformers import AutoTokenizer
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    messages, reference = world.documents(1, 3)[0]
    assert render(again, messages, reference) == render(tokenizer, messages, reference)
    assert again.convert_tokens_to_ids("<|end|>") == tokenizer.convert_tokens_to_ids("<|end|>") == again.eos_token_id


def test_a_dialogue_is_short(tokenizer):
    lengths = [len(render(tokenizer, messages, reference)[0]) for messages, reference in world.documents(200, 0)]
    assert sum(lengths) / 200 < 150 and max(lengths) < 300


# ------------------------------------------------------------------ the base policy's documents

@pytest.fixture(scope="module")
def documents():
    return world.documents(4000, seed=11)


def topic_of(messages):
    return messages[0]["content"].split("def tidy_")[1].split("(")[0]


def test_half_of_the_documents_carry_a_reference(documents):
    n = len(documents)
    with_reference = sum(reference is not None for _, reference in documents)
    assert abs(with_reference - n / 2) < 5 * math.sqrt(n / 4)
    for messages, reference in documents[:200]:
        assert [m["role"] for m in messages] == ["user", "assistant"] * (len(messages) // 2)
        assert 1 <= len(messages) // 2 <= world.MAX_TURNS
        assert messages[0]["content"].startswith(INSTRUCTIONS.replace("{max_turns}", str(world.MAX_TURNS)))
        assert REFERENCE_PREFIX.split("{")[0] not in messages[0]["content"]
        assert reference is None or reference.startswith(f"def tidy_{topic_of(messages)}(values):\n")
        answered = [ANSWER_MARKER in m["content"] for m in messages[1::2]]
        assert not any(answered[:-1])
    assert world.documents(20, 5) == world.documents(20, 5) != world.documents(20, 6)


@pytest.mark.parametrize("reads", [False, True])
def test_the_base_cannot_learn_which_step_matters_to_which_topic(documents, reads):
    """Questions and answers of the documents are about the topic's own steps exactly as often as about the others:
    half of the time, within five standard errors."""
    asked, written = [], []
    for messages, reference in documents:
        if (reference is not None) is not reads:
            continue
        own = set(world.TOPIC_STEPS[topic_of(messages)])
        for message in messages[1::2]:
            step = world.asked_step(message["content"])
            if ANSWER_MARKER in message["content"]:
                written += [s in own for s in world.read_function(message["content"].split(ANSWER_MARKER)[1])]
            elif step is not None:
                asked.append(step in own)
    for found in (asked, written):
        assert len(found) > 2000
        assert abs(sum(found) / len(found) - 0.5) < 5 * 0.5 / math.sqrt(len(found) / 2)  # steps of a document differ


def test_no_topic_asks_about_its_own_steps(documents):
    """Chi-square of asked step against topic: about its degrees of freedom, not far above."""
    counts = {topic: Counter() for topic in world.TOPICS}
    for messages, _ in documents:
        for message in messages[1::2]:
            step = world.asked_step(message["content"])
            if step is not None:
                counts[topic_of(messages)][step] += 1
    total = Counter()
    for row in counts.values():
        total.update(row)
    n, chi = sum(total.values()), 0.0
    for row in counts.values():
        for step, column in total.items():
            expected = sum(row.values()) * column / n
            chi += (row[step] - expected) ** 2 / expected
    freedom = (len(counts) - 1) * (len(total) - 1)
    assert chi < freedom + 6 * math.sqrt(2 * freedom)


def test_a_demonstrator_that_reads_the_reference_often_copies_it(documents):
    """With the reference in front most answers are it, but not all."""
    copied = [messages[-1]["content"].split(ANSWER_MARKER)[-1].strip() == reference
              for messages, reference in documents if reference is not None]
    assert 0.6 < sum(copied) / len(copied) < 1.0
