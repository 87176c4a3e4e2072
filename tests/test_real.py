"""Real formats end to end: a Hugging Face model on disk with a byte-level tokenizer and a chat template as agent and
critic, a real server as the human, ColBench's own tasks; what comes out opens in transformers and trains under TRL.

The models are random and small, so nothing is learned that is worth anything: what is tested is that every stage reads
and writes what it should. The learning stages start from trajectories that a scripted agent made of the reference
solutions, some right and some mutated, written in ColBench's offline format.
"""
import dataclasses
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import CHAT, free_port, needs_peft, save_model

import actor
import critic
from env import ANSWER_MARKER, end_of_turn, grade, load_tasks, read_trajectories, render
from machinery.files import InputError
from machinery.train import Machine, check_context, enable_checkpointing, fit, load_model, save_to
from kernels.logprob import collate, reference_sums, turn_logprobs

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
FOLDER = Path(os.environ.get("COLBENCH", ROOT.parent / "shared/colbench"))
COLBENCH, FRONTEND = FOLDER / "backend.jsonl", FOLDER / "frontend.jsonl"


def sweet(*args, check=True):
    done = subprocess.run([sys.executable, str(ROOT / "sweet.py"), *map(str, args)], cwd=ROOT, text=True,
                          capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})
    if check:
        assert done.returncode == 0, done.stderr[-2000:]
    return done


def complaint(*args):
    done = sweet(*args, check=False)
    assert done.returncode != 0 and "Traceback" not in done.stderr, done.stderr[-2000:]
    return done.stderr.strip().splitlines()[-1]


def scripted_trajectories(tasks, seed=0):
    """Two dialogues a task in ColBench's offline format: the reference as answer, and a mutated one; the prompt is
    repeated with each turn, as in the original files."""
    rng, rows = random.Random(seed), []
    for task in tasks:
        wrong = task.ground_truth.replace("return ", "return not ", 1)
        for code in (task.ground_truth, wrong):
            question = rng.choice(["What should it return?", "Which types?", "Any limits?"])
            history = [{"role": "user", "content": task.problem_description},
                       {"role": "assistant", "content": question, "input": "x" * 500, "output": question},
                       {"role": "user", "content": "Please decide."},
                       {"role": "assistant", "content": f"{ANSWER_MARKER}\n{code}", "input": "x" * 500, "output": ""}]
            rows.append({"task": task.to_record(), "dialogue_history": history, "answer": code})
    rewards = grade([row["answer"] for row in rows], [task for task in tasks for _ in range(2)])
    return [{**row, "reward": reward} for row, reward in zip(rows, rewards)]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# ------------------------------------------------------------------ the whole way

FEW = ["--rollout-per-task", "2", "--rollout-max-tokens", "12", "--rollout-max-turns", "3", "--human-max-tokens", "8",
       "--critic-epochs", "1", "--critic-lr", "1e-2", "--candidates-states", "8", "--candidates-n", "4",
       "--actor-epochs", "1", "--actor-lr", "1e-2", "--rft-epochs", "1", "--multiturn-epochs", "1",
       "--micro-batch", "2"]


@pytest.fixture(scope="session")
def agent(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("agent") / "model", seed=3)


@pytest.fixture(scope="session")
def finished(agent, server, tmp_path_factory):
    """A run on real tasks: rollout with the server as human, learning from scripted trajectories, evaluation."""
    if not COLBENCH.exists():
        pytest.skip(f"needs ColBench's backend tasks at {COLBENCH}")
    folder = tmp_path_factory.mktemp("real")
    lines = COLBENCH.read_text(encoding="utf-8").splitlines(keepends=True)
    short = sorted(lines, key=len)[:12]
    (folder / "tasks.jsonl").write_text("".join(short[:8]), encoding="utf-8")
    (folder / "heldout.jsonl").write_text("".join(short[8:10]), encoding="utf-8")
    rows = scripted_trajectories(load_tasks(folder / "tasks.jsonl"))
    assert {row["reward"] for row in rows} > {1.0} and sum(row["reward"] == 1.0 for row in rows) >= 6
    write_jsonl(folder / "offline.jsonl", rows)
    human = ["--human", server[0], "--human-model", server[1]]
    sweet("rollout", "--run", folder / "rollout", "--model", agent, "--tasks", folder / "tasks.jsonl", *human, *FEW)
    sweet("eval", "--run", folder / "learn", "--model", agent, "--trajectories", folder / "offline.jsonl", "--heldout",
          folder / "heldout.jsonl", *human, *FEW)
    return folder


def test_every_stage_ran(finished, agent):
    rolled = [json.loads(line) for line in (finished / "rollout/trajectories.jsonl").open(encoding="utf-8")]
    assert len(rolled) == 16 and all(0.0 <= row["reward"] <= 1.0 for row in rolled)
    for history in (row["dialogue_history"] for row in rolled):
        assert len(history) == 6 and all(0 < len(message["content"]) <= 400 for message in history[2::2])
    learn = finished / "learn"
    assert not (learn / "trajectories.jsonl").exists() and not (learn / "base").exists()
    methods = [json.loads(line)["method"] for line in (learn / "eval.jsonl").open(encoding="utf-8")]
    assert len(methods) == 4 * 2 * 2 and set(methods) == {"base", "RFT", "multi-turn DPO", "SWEET"}
    for name in ("critic", "actor", "rft", "multiturn"):
        start, end = (load_model(path)[0].state_dict() for path in (agent, learn / name))
        assert any(not torch.equal(start[key], end[key]) for key in start)
        log = json.loads((learn / name / "log.json").read_text())
        assert name == "rft" or abs(log[0]["margin"]) < 1e-4
    states = [json.loads(line) for line in (learn / "candidates.jsonl").open(encoding="utf-8")]
    assert len(states) == 8 and all("advantage" in c for state in states for c in state["candidates"])


def test_written_trajectories_are_read_back(finished, agent):
    """Ids as they were sampled: the views of a file read back are those of the dialogues in it."""
    path = finished / "rollout/trajectories.jsonl"
    tokenizer = load_model(agent)[1]
    rows = [json.loads(line) for line in path.open(encoding="utf-8")]
    for row, back in zip(rows, read_trajectories(path), strict=True):
        assert back["task"] == row["task"] and back["reward"] == row["reward"]
        ids, turn_ids = render(tokenizer, back["dialogue_history"], row["task"]["ground_truth"])
        assert (ids, turn_ids) == render(tokenizer, row["dialogue_history"], row["task"]["ground_truth"])
        for k, message in enumerate(row["dialogue_history"][1::2], 1):
            assert [i for i, n in zip(ids, turn_ids) if n == k] == message["output_ids"]
            assert message["input"] == tokenizer.decode(render(tokenizer, row["dialogue_history"][:2 * k - 1])[0])


def test_pairs_train_unchanged_under_trl(finished, agent, tmp_path):
    datasets, trl = pytest.importorskip("datasets"), pytest.importorskip("trl")
    from transformers import AutoModelForCausalLM, AutoTokenizer
    data = datasets.load_dataset("json", data_files=str(finished / "learn/pairs.jsonl"), split="train",
                                 cache_dir=str(tmp_path / "cache"))
    assert len(data) >= 4
    model = AutoModelForCausalLM.from_pretrained(finished / "learn/actor")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    settings = trl.DPOConfig(output_dir=str(tmp_path / "out"), per_device_train_batch_size=2, max_steps=2, bf16=False,
                             learning_rate=1e-2, report_to=[], use_cpu=True, gradient_checkpointing=False)
    trainer = trl.DPOTrainer(model=model, args=settings, train_dataset=data,
                             processing_class=AutoTokenizer.from_pretrained(finished / "learn/actor"))
    result = trainer.train()
    assert result.training_loss == result.training_loss
    assert any(not torch.equal(before[name], value) for name, value in trainer.model.state_dict().items())


@pytest.mark.parametrize("name", ["actor", "critic"])
def test_checkpoints_answer_through_a_pipeline(finished, name):
    from transformers import pipeline
    generator = pipeline("text-generation", model=str(finished / "learn" / name))
    ends = generator.model.generation_config.eos_token_id
    assert end_of_turn(generator.tokenizer) in ends
    answer = generator([{"role": "user", "content": "Write f."}], max_new_tokens=8, do_sample=False)
    assert answer[0]["generated_text"][-1]["role"] == "assistant"


def test_candidates_from_elsewhere(finished, agent, tmp_path):
    """Texts that some other sampler wrote become pairs; a turn that came twice counts twice."""
    states = [json.loads(line) for line in (finished / "learn/samples.jsonl").open(encoding="utf-8")][:3]
    texts = ["Ask?", "Ask?", f"{ANSWER_MARKER} x", {"content": "Which?", "count": 3, "logprob": -1.0}]
    outside = [{"task": s["task"], "messages": s["messages"], "candidates": texts, "who": "vLLM"} for s in states]
    write_jsonl(tmp_path / "c.jsonl", outside)
    sweet("pairs", "--run", tmp_path / "run", "--model", agent, "--trajectories", finished / "offline.jsonl",
          "--candidates", tmp_path / "c.jsonl", *FEW)
    ranked = [json.loads(line) for line in (tmp_path / "run/candidates.jsonl").open(encoding="utf-8")]
    tokenizer = load_model(agent)[1]
    for state in ranked:
        assert [(c["content"], c["count"]) for c in state["candidates"]] == [
            ("Ask?", 2), (f"{ANSWER_MARKER} x", 1), ("Which?", 3)]
        assert all(c["output_ids"][-1] == end_of_turn(tokenizer) for c in state["candidates"])
        assert state["who"] == "vLLM"
    assert (tmp_path / "run/pairs.jsonl").stat().st_size > 0
    more = ["--run", tmp_path / "run", "--model", agent, "--trajectories", finished / "offline.jsonl", *FEW]
    before = (tmp_path / "run/critic/log.json").stat().st_mtime_ns
    sweet("critic", *more)  # which does not depend on the candidates
    assert (tmp_path / "run/critic/log.json").stat().st_mtime_ns == before
    other = write_jsonl(tmp_path / "other.jsonl", outside[:2])
    assert "candidates" in complaint("pairs", *more, "--candidates", other)


@pytest.mark.parametrize("candidate", [
    3, {"text": "a"}, {"content": "a", "count": "3"}, {"content": "a", "count": 0}, {"content": "a", "output_ids": "b"},
    {"content": "a", "output_ids": [10 ** 6]}, [1, 2]])
def test_candidates_that_are_none_are_named_with_their_line(tokenizer, tmp_path, candidate):
    state = {"task": GOOD["task"], "messages": GOOD["dialogue_history"][:1], "candidates": ["fine", candidate]}
    write_jsonl(tmp_path / "c.jsonl", [{**state, "candidates": ["fine"]}, state])
    with pytest.raises(InputError, match="c.jsonl, line 2: field 'candidates'"):
        actor.read_candidates(tokenizer, tmp_path / "c.jsonl")


# ------------------------------------------------------------------ trajectories in the official format

GOOD = {"task": {"problem_description": "p", "ground_truth": "def f(): pass", "test_cases": {"a": "f()"}},
        "dialogue_history": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "x"}], "reward": 1.0}


def test_extra_and_missing_optional_keys(tmp_path):
    rich = {**GOOD, "answer": "x", "model": "llama", "task": {**GOOD["task"], "hidden_information": "h", "id": 7}}
    rich["dialogue_history"] = [{"role": "user", "content": "p", "time": 1},
                                {"role": "assistant", "content": "x", "input": "long" * 999, "output": "x", "n": 2}]
    poor = {**GOOD, "reward": 0, "task": {"problem_description": "p", "ground_truth": "g"}}
    first, second = read_trajectories(write_jsonl(tmp_path / "t.jsonl", [rich, poor]))
    assert first["task"]["hidden_information"] == "h" and first["task"]["id"] == 7
    assert first["dialogue_history"] == GOOD["dialogue_history"] and first["reward"] == 1.0
    assert second["task"]["test_cases"] == {} and second["reward"] == 0.0


@pytest.mark.parametrize("change, words", [
    ({"reward": None}, "'reward'"), ({"reward": "1"}, "'reward'"), ({"reward": True}, "'reward'"),
    ({"task": {"problem_description": "p"}}, "ground_truth"), ({"dialogue_history": []}, "'dialogue_history'"),
    ({"dialogue_history": GOOD["dialogue_history"][::-1]}, "'dialogue_history'"),
    ({"reward": float("nan")}, "'reward'"),
    ({"dialogue_history": "x"}, "'dialogue_history'"), ({"dialogue_history": [{"role": "user"}]}, "'content'"),
    ({"task": {**GOOD["task"], "test_cases": {"a": 5}}}, "'test_cases'")])
def test_a_trajectory_that_is_none_is_one_line(tmp_path, change, words):
    path = write_jsonl(tmp_path / "t.jsonl", [GOOD, {**GOOD, **change}])
    with pytest.raises(InputError, match=words) as caught:
        list(read_trajectories(path))
    assert f"{path}, line 2" in str(caught.value) and "\n" not in str(caught.value)


def test_a_trajectory_without_reward_stops_the_critic_before_any_work(agent, tmp_path):
    path = write_jsonl(tmp_path / "t.jsonl", [GOOD, {k: v for k, v in GOOD.items() if k != "reward"}])
    line = complaint("critic", "--run", tmp_path / "run", "--model", agent, "--trajectories", path)
    assert f"{path}, line 2" in line and "'reward'" in line


def test_trajectories_are_streamed(tmp_path):
    """Of a file of 30 MB, nearly all of it prompts that are repeated, a tenth is in memory at most."""
    import tracemalloc
    row = {**GOOD, "dialogue_history": [dict(m, input="y" * 100_000) for m in GOOD["dialogue_history"]]}
    path = write_jsonl(tmp_path / "big.jsonl", [row] * 150)
    assert path.stat().st_size > 30_000_000
    tracemalloc.start()
    kept = list(read_trajectories(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(kept) == 150 and peak < 3_000_000


# ------------------------------------------------------------------ bad input: one line, before any long work

def test_a_task_file_of_the_other_kind(agent, tmp_path):
    if not FRONTEND.exists():
        pytest.skip(f"needs ColBench's frontend tasks at {FRONTEND}")
    line = complaint("rollout", "--run", tmp_path / "run", "--model", agent, "--tasks", FRONTEND)
    assert str(FRONTEND) in line and "line 1" in line and "test_cases" in line


def test_models_that_cannot_talk(tmp_path):
    with pytest.raises(InputError, match="no chat template"):
        load_model(save_model(tmp_path / "base", template=None))
    with pytest.raises(InputError, match="control token"):
        load_model(save_model(tmp_path / "odd", template=CHAT.replace("<|im_end|>", "<|stop|>")))
    for path in (tmp_path / "nothing", tmp_path):
        with pytest.raises(InputError, match="cannot be loaded") as caught:
            load_model(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(InputError, match="--dtype"):
        load_model(tmp_path / "base", Machine(dtype="float8"))


def save_gguf(folder, path):
    """A model that `save_model` saved as the GGUF file that llama.cpp's converter makes of it, in float32."""
    from gguf import GGUFWriter
    model, tokenizer = load_model(folder)
    config, writer = model.config, GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(len(tokenizer))
    writer.add_tokenizer_model("gpt2")
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    writer.add_token_list(tokens)
    writer.add_token_types([3 if i in tokenizer.added_tokens_decoder else 1 for i in range(len(tokens))])
    writer.add_token_scores([0.0] * len(tokens))  # no merges are to be found
    writer.add_eos_token_id(tokenizer.convert_tokens_to_ids("<|endoftext|>"))
    writer.add_chat_template(tokenizer.chat_template)
    names = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
             "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
             "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "model.layers": "blk",
             "model.embed_tokens": "token_embd", "model.norm": "output_norm"}
    for name, weight in model.state_dict().items():
        if "q_proj" in name or "k_proj" in name:  # llama.cpp turns neighbouring dimensions, not those of two halves
            weight = weight.view(-1, 2, config.head_dim // 2, config.hidden_size).transpose(1, 2).reshape(weight.shape)
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        if name != "lm_head.weight":
            writer.add_tensor(name, weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


@pytest.fixture(scope="module")
def packed(agent, tmp_path_factory):
    pytest.importorskip("gguf", reason="needs pip install gguf")
    return save_gguf(agent, tmp_path_factory.mktemp("gguf") / "agent.gguf")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_gguf_file_is_a_model_and_what_is_saved_of_it_a_plain_directory(agent, packed, tmp_path, dtype):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    machine = Machine(dtype=dtype)
    model, tokenizer = load_model(packed, machine)
    plain, same = load_model(agent, machine)
    views = views_of(same)
    assert views_of(tokenizer) == views and tokenizer.chat_template == same.chat_template
    assert reference_sums(model, views) == reference_sums(plain, views)
    fit(model, views, likelihood, tmp_path / "out", Config(lr=1e-2), 0, save_to(model, tokenizer))
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert "quantization" not in (tmp_path / "out/config.json").read_text() and opened.dtype == getattr(torch, dtype)
    assert reference_sums(opened, views) == reference_sums(model, views) != reference_sums(plain, views)
    assert views_of(AutoTokenizer.from_pretrained(tmp_path / "out")) == views


def test_adapters_on_a_gguf_file(packed, tmp_path):
    """They come back on it, and learn on."""
    needs_peft()
    model, tokenizer, _ = trained(packed, tmp_path / "first", Config(lr=1e-2), Machine(lora=4))
    views = views_of(tokenizer)
    assert reference_sums(load_model(tmp_path / "first")[0], views) == reference_sums(model, views)
    again, _, log = trained(tmp_path / "first", tmp_path / "second", Config(lr=1e-2, epochs=3), Machine(lora=4))
    assert log[-1]["loss"] < log[0]["loss"]
    assert reference_sums(load_model(tmp_path / "second")[0], views) == reference_sums(again, views)
    (tmp_path / "first/adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(InputError, match="first: its adapter_config.json names no model"):
        load_model(tmp_path / "first")


def test_agent_and_human_from_gguf_files(packed, tmp_path):
    """A run knows such a file by its content."""
    import sweet as program
    tasks = write_jsonl(tmp_path / "tasks.jsonl", [GOOD["task"]])
    copy = shutil.copy(packed, tmp_path / "agent.gguf")

    def run(path):
        program.main(["rollout", "--run", str(tmp_path / "run"), "--tasks", str(tasks), "--rollout-per-task", "2",
                      "--rollout-max-turns", "2", "--rollout-max-tokens", "4", "--human-max-tokens", "4", "--model",
                      str(path), "--human", str(path)])
    run(packed)
    history = json.loads((tmp_path / "run/trajectories.jsonl").read_text().splitlines()[0])["dialogue_history"]
    assert len(history) == 4 and history[2]["content"]
    run(copy)
    with open(copy, "ab") as file:
        file.write(b"0")
    with pytest.raises(SystemExit, match=r"agent.gguf \(sha256"):
        run(copy)


@pytest.mark.parametrize("kind", ["missing", "empty", "short", "half", "text", "folder"])
def test_a_gguf_file_that_is_none(packed, tmp_path, kind):
    path, whole = tmp_path / "m.gguf", Path(packed).read_bytes()
    if kind == "folder":
        path.mkdir()
    elif kind != "missing":
        path.write_bytes({"empty": b"", "short": whole[:20], "half": whole[:len(whole) // 2], "text": b"{}" * 99}[kind])
    with pytest.raises(InputError, match="m.gguf: cannot be loaded") as caught:
        load_model(path)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_without_pad_or_eos_says_what_stands_in(tmp_path, capsys):
    _, tokenizer = load_model(save_model(tmp_path / "bare", eos=None, pad=None))
    assert tokenizer.eos_token == tokenizer.pad_token == "<|im_end|>"
    printed = capsys.readouterr().err
    assert "no eos_token" in printed and "no pad_token" in printed and "<|im_end|>" in printed


def test_a_dialogue_that_is_longer_than_the_context(agent, tmp_path):
    small = save_model(tmp_path / "small", context=700)
    tasks = write_jsonl(tmp_path / "tasks.jsonl", [{"problem_description": "p", "ground_truth": "# " + "long " * 99,
                                                    "test_cases": {"a": "f()"}}])
    line = complaint("rollout", "--run", tmp_path / "run", "--model", small, "--tasks", tasks)
    assert "task 1" in line and "700" in line and "--rollout-max-turns" in line
    model, tokenizer = load_model(small)
    check_context(model, 700, "x")
    with pytest.raises(InputError, match="701"):
        check_context(model, 701, "x")


def test_an_unreachable_server(agent, tmp_path):
    url = f"http://127.0.0.1:{free_port()}/v1"
    line = complaint("rollout", "--run", tmp_path / "run", "--model", agent, "--human", url, "--human-model", "m")
    assert url in line and "onnection" in line
    assert not (tmp_path / "run/trajectories.jsonl.partial").exists()


# ------------------------------------------------------------------ memory: dtype, adapters, checkpointing

@dataclasses.dataclass
class Config:
    lr: float = 1e-3
    batch_size: int = 4
    epochs: int = 1


def views_of(tokenizer, n=8):
    return [render(tokenizer, [{"role": "user", "content": "p" * i}, {"role": "assistant", "content": f"x{i}"}])
            for i in range(1, n + 1)]


def likelihood(model, batch, _=None):
    sums, lengths = turn_logprobs(model, collate(batch, model.device))
    return -sums.sum() / lengths.sum(), {}


def trained(path, out, cfg, machine, **extra):
    model, tokenizer = load_model(path, machine, train=True)
    log = fit(model, views_of(tokenizer), likelihood, out, cfg, 0, save_to(model, tokenizer), **extra)
    return model, tokenizer, log


def test_checkpointing_recomputes_and_changes_no_number(agent, tmp_path):
    plain, _, log = trained(agent, tmp_path / "a", Config(), Machine())
    calls = []
    model, tokenizer = load_model(agent, Machine(checkpointing=True), train=True)
    for layer in model.model.layers:
        inner = layer._gradient_checkpointing_func
        layer._gradient_checkpointing_func = lambda *a, inner=inner, **k: (calls.append(1), inner(*a, **k))[1]
    reference_sums(model, views_of(tokenizer))
    assert not calls
    same = fit(model, views_of(tokenizer), likelihood, tmp_path / "b", Config(), 0, save_to(model, tokenizer))
    assert same == log and len(calls) == 2 * len(log)  # its two layers, each step
    assert all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(), model.state_dict().values()))


def test_checkpointing_keeps_dropout_off(tmp_path):
    """Layers recompute only in training mode; nothing else may be in it."""
    path = save_model(tmp_path / "m", attention_dropout=0.5)
    logs = [trained(path, tmp_path / str(flag), Config(), Machine(checkpointing=flag))[2] for flag in (False, True)]
    assert logs[0] == logs[1]


def test_checkpointing_keeps_the_dropout_of_whole_layers_off(agent, tmp_path):
    """OPT's layers apply theirs between attention and MLP, where they also recompute."""
    from transformers import OPTConfig, OPTForCausalLM
    tokenizer, logs = load_model(agent)[1], []
    for on in (False, True):
        torch.manual_seed(0)
        model = OPTForCausalLM(OPTConfig(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, ffn_dim=24,
                                         num_attention_heads=2, word_embed_proj_dim=16, dropout=0.5))
        if on:
            enable_checkpointing(model)
        logs.append(fit(model, views_of(tokenizer), likelihood, tmp_path / str(on), Config(), 0, lambda folder: None))
    assert [row["loss"] for row in logs[0]] == pytest.approx([row["loss"] for row in logs[1]], rel=1e-5)


def test_adapters_start_at_the_reference_and_leave_the_model_alone(agent, tmp_path):
    needs_peft()
    from transformers import AutoModelForCausalLM
    base, tokenizer = load_model(agent)
    adapted, _ = load_model(agent, Machine(lora=4), train=True)
    views = views_of(tokenizer)
    assert reference_sums(base, views) == reference_sums(adapted, views)
    start = {name: p.clone() for name, p in adapted.named_parameters()}
    fit(adapted, views, likelihood, tmp_path / "out", Config(lr=1e-2), 0, save_to(adapted, tokenizer))
    changed = {name for name, p in adapted.named_parameters() if not torch.equal(p, start[name])}
    assert changed and all("lora_" in name for name in changed)
    assert sum(f.stat().st_size for f in (tmp_path / "out").glob("*.safetensors")) < 60_000
    again, _ = load_model(tmp_path / "out")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert reference_sums(again, views) == reference_sums(adapted, views) == reference_sums(opened, views)
    assert reference_sums(again, views) != reference_sums(base, views)
    first, second = (load_model(agent, Machine(lora=4), train=True, seed=5)[0].state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_come_back_as_they_were_trained(agent, tmp_path, dtype):
    """They learn in float32; a reloaded critic ranks with the log-probs of the one that was trained, to the bit."""
    needs_peft()
    machine = Machine(lora=4, dtype=dtype)
    model, tokenizer, _ = trained(agent, tmp_path / "out", Config(lr=3e-2), machine)
    views = views_of(tokenizer)
    again, _ = load_model(tmp_path / "out", machine)
    learned = {name: p for name, p in model.named_parameters() if p.requires_grad}
    back = dict(again.named_parameters())
    assert learned and all(torch.equal(p, back[name]) and back[name].dtype == torch.float32
                           for name, p in learned.items())
    assert any(not torch.equal(p, p.bfloat16().float()) for p in learned.values())
    assert reference_sums(again, views) == reference_sums(model, views) != reference_sums(
        load_model(agent, machine)[0], views)


@pytest.mark.parametrize("lora", [0, 4, 8])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_learn_on(agent, tmp_path, lora, dtype):
    """A model that is adapters is the initial policy as it is; training goes on in them, with --lora and without."""
    needs_peft()
    machine = Machine(lora=lora, dtype=dtype)
    first, tokenizer, _ = trained(agent, tmp_path / "first", Config(lr=1e-2), Machine(lora=4, dtype=dtype))
    views = views_of(tokenizer)
    start = reference_sums(first, views)
    assert reference_sums(load_model(tmp_path / "first", machine)[0], views) == start
    assert reference_sums(load_model(tmp_path / "first", machine, train=True)[0], views) == start
    second, _, log = trained(tmp_path / "first", tmp_path / "second", Config(lr=1e-2, epochs=3), machine)
    learned = {name for name, p in second.named_parameters() if p.requires_grad}
    assert learned == {name for name, p in first.named_parameters() if p.requires_grad}
    assert log[-1]["loss"] < log[0]["loss"]
    shutil.rmtree(tmp_path / "first")  # what was learned in two steps stands on the model alone
    again, _ = load_model(tmp_path / "second", machine)
    assert reference_sums(again, views) == reference_sums(second, views) != start


def test_adapters_resume_bit_for_bit(agent, tmp_path):
    needs_peft()
    whole = trained(agent, tmp_path / "whole", Config(epochs=3), Machine(lora=2))[0].state_dict()
    calls = []

    def dies(model, batch, _):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return likelihood(model, batch)
    model, tokenizer = load_model(agent, Machine(lora=2), train=True)
    with pytest.raises(KeyboardInterrupt):
        fit(model, views_of(tokenizer), dies, tmp_path / "out", Config(epochs=3), 0, save_to(model, tokenizer),
            checkpoint_seconds=0.0)
    assert (tmp_path / "out.partial/checkpoint.pt").stat().st_size < 100_000
    resumed = trained(agent, tmp_path / "out", Config(epochs=3), Machine(lora=2), checkpoint_seconds=0.0)[0]
    assert all(torch.equal(whole[name], value) for name, value in resumed.state_dict().items())


def test_small_steps_are_not_lost_in_bfloat16(agent, tmp_path):
    """60 steps of 3e-5 each: bfloat16 weights near 0.3 would not move at all; the optimizer's float32 ones add up."""
    cfg, rough = Config(lr=3e-5, epochs=30), Machine(dtype="bfloat16")
    model, _, log = trained(agent, tmp_path / "out", cfg, rough)
    start, exact = load_model(agent, rough)[0], trained(agent, tmp_path / "exact", cfg, Machine())[0]
    assert model.dtype == torch.bfloat16 and log[-1]["loss"] < log[0]["loss"]
    pairs = list(zip(start.parameters(), model.parameters(), exact.parameters()))
    moved = sum((a != b).sum().item() for a, b, _ in pairs) / sum(a.numel() for a, _, _ in pairs)
    expected = sum((a != c.bfloat16()).sum().item() for a, _, c in pairs) / sum(a.numel() for a, _, _ in pairs)
    assert 0.5 * expected < moved < 1.5 * expected and moved > 0.1


def test_bfloat16_resumes_bit_for_bit(agent, tmp_path):
    cfg, rough, calls = Config(lr=1e-4, epochs=3), Machine(dtype="bfloat16"), []
    whole = trained(agent, tmp_path / "whole", cfg, rough)[0].state_dict()

    def dies(model, batch, _):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return likelihood(model, batch)
    model, tokenizer = load_model(agent, rough, train=True)
    with pytest.raises(KeyboardInterrupt):
        fit(model, views_of(tokenizer), dies, tmp_path / "out", cfg, 0, save_to(model, tokenizer),
            checkpoint_seconds=0.0)
    resumed = trained(agent, tmp_path / "out", cfg, rough, checkpoint_seconds=0.0)[0]
    assert all(torch.equal(whole[name], value) for name, value in resumed.state_dict().items())


def test_one_copy_of_the_weights_is_alive_at_a_time(agent, tmp_path, monkeypatch):
    """Count models while the critic's and the actor's stages run: pi_ref is never a second one."""
    import gc

    import sweet as program
    alive = []

    def counting(function):
        def wrapper(*args, **kwargs):
            gc.collect()
            from transformers import PreTrainedModel
            alive.append(sum(isinstance(thing, PreTrainedModel) and hasattr(thing, "lm_head")
                             for thing in gc.get_objects()))
            return function(*args, **kwargs)
        return wrapper
    gc.collect()
    from transformers import PreTrainedModel
    before = sum(isinstance(thing, PreTrainedModel) and hasattr(thing, "lm_head") for thing in gc.get_objects())
    monkeypatch.setattr(critic, "loss_fn", counting(critic.loss_fn))
    monkeypatch.setattr(program.actor, "preference_loss", counting(program.actor.preference_loss))
    monkeypatch.setattr(program.critic, "rank", counting(program.critic.rank))
    rows = [{**GOOD, "reward": float(i % 2), "dialogue_history": [
        {"role": "user", "content": "p"}, {"role": "assistant", "content": f"x{i}"}]} for i in range(6)]
    path = write_jsonl(tmp_path / "t.jsonl", rows)
    program.main(["actor", "--run", str(tmp_path / "run"), "--model", agent, "--trajectories", str(path), *FEW,
                  "--critic-lr", "0.05"])
    assert len(alive) >= 3 and max(alive) - before == 1
