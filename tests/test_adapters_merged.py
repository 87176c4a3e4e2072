"""`export merged`: plain weights that say what model and adapters together say."""
import json

import pytest
import torch
from conftest import needs_peft, save_model

import sweet as program
from adapters.merged import merge
from machinery.train import Machine, add_adapters, load_model, save_to


def adapted(folder, dtype, scale=0.2):
    """A folder of adapters that change much, on a random model."""
    needs_peft()
    machine = Machine(dtype=dtype)
    model, tokenizer = load_model(save_model(folder / "below", seed=5), machine)
    add_adapters(model, 3, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight += scale * torch.randn(weight.shape, generator=generator)
    (folder / "actor").mkdir()
    save_to(model, tokenizer)(folder / "actor")
    return folder / "actor", machine


IDS = torch.arange(5, 45).reshape(2, 20)


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 0.05)])
def test_logits_are_those_of_model_and_adapters(tmp_path, dtype, tolerance):
    """tolerance: of the largest logit. In bfloat16 a sum W + s B A is rounded once, the two terms apart are not."""
    folder, machine = adapted(tmp_path, dtype)
    model, tokenizer = merge(folder, machine)
    save_to(model, tokenizer)(tmp_path / "merged")
    assert not (tmp_path / "merged/adapter_config.json").exists()
    with torch.no_grad():
        with_adapters = load_model(folder, machine)[0](IDS).logits.float()
        plain, again = load_model(tmp_path / "merged", machine)
        found = plain(IDS).logits.float()
        below = load_model(tmp_path / "below", machine)[0](IDS).logits.float()
    scale = with_adapters.abs().max()
    assert plain.dtype == getattr(torch, dtype) and not any("lora" in name for name, _ in plain.named_parameters())
    assert (found - with_adapters).abs().max() < tolerance * scale
    assert (below - with_adapters).abs().max() > 4 * tolerance * scale  # the adapters do something
    assert again.get_vocab() == tokenizer.get_vocab() and again.chat_template == tokenizer.chat_template


@pytest.mark.slow
def test_the_command(tmp_path, capsys):
    """A run with --lora, a step long; then the same run as plain weights, in another command and without a flag."""
    needs_peft()
    run = tmp_path / "run"
    program.main(["base", "--run", str(run), "--model", save_model(tmp_path / "model", seed=3), "--base-documents", "9",
                  "--base-batch-size", "2", "--base-epochs", "1", "--base-lr", "1e-2", "--lora", "2"])
    program.main(["export", "merged", "--run", str(run)])
    assert f"{run}/base is merged: {run}/merged/base" in capsys.readouterr().out
    kept = sorted(path.name for path in (run / "merged").iterdir())
    assert kept == ["base"]
    with torch.no_grad():
        logits = [load_model(folder)[0](IDS).logits for folder in (run / "base", run / "merged/base")]
    assert torch.allclose(*logits, atol=1e-5)
    assert "library_name: peft" in (run / "base/README.md").read_text()
    assert "library_name: transformers" in (run / "merged/base/README.md").read_text()
    settings = json.loads((run / "settings.json").read_text())
    assert settings["lora"] == 2
    with pytest.raises(SystemExit, match="base was made with lora = 2, now it is 4"):
        program.main(["export", "merged", "--run", str(run), "--lora", "4"])


def test_without_adapters_there_is_nothing_to_merge(tmp_path):
    (tmp_path / "run").mkdir()
    with pytest.raises(SystemExit, match="export merged: holds no adapters; --lora RANK learns such"):
        program.main(["export", "merged", "--run", str(tmp_path / "run")])
    with pytest.raises(SystemExit, match="there is no such run"):
        program.main(["export", "merged", "--run", str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit, match="--redo critic"):
        program.main(["export", "merged", "--run", str(tmp_path / "run"), "--redo", "critic"])
