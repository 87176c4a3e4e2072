"""ColBench in `verifiers`: loaded by name, rolled out against a loopback server, with the critic's advantages."""
import json
import threading

import pytest
import torch
from conftest import Proxy, perturbed, save_model

from critic import critic_view, turn_advantages
from kernels.logprob import lay_out, turn_logprobs
from machinery.files import InputError
from machinery.train import load_model
from worlds import backend as world

vf = pytest.importorskip("verifiers", reason="needs pip install verifiers; no part of requirements-dev.txt")
pytestmark = pytest.mark.slow
STEP = world.STEPS[0].ask


@pytest.fixture
def agent(monkeypatch):
    """An OpenAI-compatible server: on even requests it asks, then answers with the reference; else it errs."""
    references = {task.problem_description: task.ground_truth for task in world.make_tasks(2, 3)}

    def speak(_, body):
        messages = json.loads(body)["messages"]
        reference, = [source for text, source in references.items() if messages[0]["content"].endswith(text)]
        said = f"I WANT TO ANSWER:\n{reference}" if len(messages) > 1 else f"For the list{STEP}"
        if reference == list(references.values())[1]:
            said = "What?"
        return {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [
            {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": said}}]}
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    proxy = Proxy("http://127.0.0.1:9/v1", speak)
    yield vf.ClientConfig(api_key_var="OPENAI_API_KEY", api_base_url=proxy.url, max_retries=0)
    proxy.close()


def test_loaded_by_name_and_rolled_out(agent, tmp_path):
    initial = save_model(tmp_path / "base", seed=11)
    model, tokenizer = load_model(initial)
    perturbed(model).save_pretrained(tmp_path / "critic")
    tokenizer.save_pretrained(tmp_path / "critic")
    env = vf.load_environment("adapters.verifiers", n=2, seed=3, max_turns=3, critic=str(tmp_path / "critic"),
                              initial=initial)
    found = env.evaluate_sync(agent, "m", state_columns=["trajectory"])["outputs"]
    right, wrong = sorted(found, key=lambda output: -output["reward"])
    first, second = world.make_tasks(2, 3)
    assert (right["answer"], right["reward"], right["metrics"]["num_turns"]) == (first.ground_truth, 1.0, 2)
    assert (wrong["answer"], wrong["reward"], wrong["metrics"]["num_turns"]) == (second.ground_truth, 0.0, 3)
    assert right["error"] is None and right["prompt"][0]["content"].endswith(first.problem_description)
    asked, reply, answer = right["completion"]
    rules = world.read_function(first.ground_truth)
    expected = [world.STEPS[0].values[rules[0]][0]] if 0 in rules else world.NO_PREFERENCE
    assert reply["role"] == "user" and any(text in reply["content"] for text in expected)
    for output, task in ((right, first), (wrong, second)):
        history = [{"role": m["role"], "content": m["content"]} for m in [*output["prompt"], *output["completion"]]]
        batch = lay_out(model, [critic_view(tokenizer, {"task": task.to_record(), "dialogue_history": history})])
        with torch.no_grad():  # Eq. 3 again
            sums, lengths = turn_logprobs(load_model(tmp_path / "critic")[0], batch)
            wanted = turn_advantages(sums, turn_logprobs(model, batch)[0], lengths)[0].tolist()
        judged = [step["extras"]["critic_advantage"] for step in output["trajectory"]]
        assert judged == pytest.approx(wanted, abs=1e-5) and any(judged)
        assert output["metrics"]["critic_advantage"] == pytest.approx(sum(wanted) / len(wanted), abs=1e-5)


def test_a_human_who_leaves_is_an_error_of_the_rollout(agent, tmp_path, monkeypatch):
    (tmp_path / "gone.py").write_text("class Gone:\n    def reply(self, tasks, dialogues):\n"
                                      "        return [None] * len(tasks)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    env = vf.load_environment("adapters.verifiers", n=1, seed=3, human="gone:Gone")
    output, = env.evaluate_sync(agent, "m")["outputs"]
    assert "the human does not reply any more" in str(output["error"]) and output["reward"] == 0


def test_many_threads_are_served_together():
    from adapters.verifiers import Together
    batches, entered, go_on = [], threading.Event(), threading.Event()

    def work(items):
        batches.append(sorted(items))
        entered.set()
        go_on.wait()
        if -1 in items:
            raise InputError("bad")
        return [2 * item for item in items]
    together, found = Together(work), {}

    def call(item):
        try:
            found[item] = together(item)
        except InputError as error:
            found[item] = str(error)

    def start(items):
        threads = [threading.Thread(target=call, args=(item,)) for item in items]
        for thread in threads:
            thread.start()
        return threads
    threads = start([0])
    entered.wait()
    threads += start([1, 2, 3])
    while together.waiting.qsize() < 3:
        pass
    go_on.set()
    for thread in threads:
        thread.join()
    assert batches == [[0], [1, 2, 3]] and found == {0: 0, 1: 2, 2: 4, 3: 6}
    call(-1)
    assert found[-1] == "bad"


def test_bad_input_names_what_is_wrong():
    for given, said in (({"critic": "runs/x/critic"}, "needs both"), ({"task": "bakend"}, "perhaps backend"),
                        ({"tasks": "nowhere.jsonl"}, "nowhere.jsonl: cannot be read")):
        with pytest.raises(RuntimeError, match=said):
            vf.load_environment("adapters.verifiers", **given)
