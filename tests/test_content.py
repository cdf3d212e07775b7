"""A run is identified by the content of its model and data, not by their paths: moved, it continues; changed, it does not."""

import json
import os
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from configs.load import ROOT, UserError, load
from data.content import model_content, run_content
from log import Log
from tools import export


def copied(folder):
    """Copy the demo's model and data into a folder, and return the folder."""
    shutil.copytree(ROOT / "data/tiny", folder)
    return folder


def settings(tmp_path, model, train=None):
    paths = [f"--model={model}", f"--train_data={train or model / 'train.jsonl'}"]
    cfg = load([str(ROOT / "configs/tiny.py"), f"--out_dir={tmp_path}/runs", "--name=a", *paths])
    cfg.critic_model = cfg.model
    cfg.content = run_content(cfg)
    return cfg


def edit_json(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def train_a_little(folder):
    tensors = load_file(folder / "model.safetensors")
    save_file({name: tensor * 1.0001 for name, tensor in tensors.items()}, folder / "model.safetensors")


def append(file, text):
    with open(file, "a", encoding="utf-8") as out:
        out.write(text)


# What may happen to a copy of the demo's folder, and what the refusal then names, or None if the run is continued.
CHANGES = {
    "moved": (lambda folder: None, None),
    "a commit elsewhere": (lambda folder: (folder / "README.md").write_text("new"), None),
    "saved by another version": (lambda f: edit_json(f / "config.json", transformers_version="4.0"), None),
    "other sampling defaults": (lambda f: edit_json(f / "generation_config.json", temperature=0.6), None),
    "fine-tuned": (train_a_little, "another model (other weights), another critic_model (other weights)"),
    "another config": (
        lambda f: edit_json(f / "config.json", rms_norm_eps=1e-5),
        "another model (other config.json",
    ),
    "another tokenizer": (lambda f: append(f / "tokenizer.json", "\n"), "another model (other tokenizer"),
    "other end tokens": (
        lambda f: edit_json(f / "generation_config.json", eos_token_id=[0, 1]),
        "another model (other end tokens",
    ),
    "other questions": (
        lambda f: append(f / "train.jsonl", '{"question": "1+1", "answer": "2"}\n'),
        "is a run with another train_data",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_run_is_tied_to_content(change, tmp_path):
    """Fails if a run cannot be continued where the model has another path, as in another container, or if it is
    continued with another model whose files have the same names and sizes."""
    Log(settings(tmp_path, copied(tmp_path / "old place"))).metrics.close()
    folder = copied(tmp_path / "new place")
    edit, words = CHANGES[change]
    edit(folder)
    shutil.rmtree(tmp_path / "old place")
    if words is None:
        Log(settings(tmp_path, folder)).metrics.close()
        found = json.loads((tmp_path / "runs/a/config.json").read_text())
        assert found["model"] == str(folder)  # as export.py needs it
        return
    with pytest.raises(UserError) as error:
        Log(settings(tmp_path, folder))
    assert words in str(error.value) and "choose another --name" in str(error.value)


def test_the_order_of_files_is_content(tmp_path):
    """Fails if two data files may change places: each step would take other questions than before."""
    folder = copied(tmp_path / "model")
    both = [f"{folder}/train.jsonl", f"{folder}/eval.jsonl"]
    Log(settings(tmp_path, folder, ",".join(both))).metrics.close()
    Log(settings(tmp_path, folder, ",".join(both))).metrics.close()
    with pytest.raises(UserError, match="another train_data"):
        Log(settings(tmp_path, folder, ",".join(both[::-1])))


def test_shards_are_content(tmp_path):
    """Fails if only the first of several weight files is compared."""
    folder = copied(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for i, name in enumerate(tensors):
        weight_map[name] = f"model-{i % 2}.safetensors"
    for shard in set(weight_map.values()):
        part = {name: tensors[name] for name in tensors if weight_map[name] == shard}
        save_file(part, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    before = model_content(str(folder))
    assert model_content(str(folder)) == before
    last = folder / "model-1.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(last).items()}, last)
    assert model_content(str(folder))["weights"] != before["weights"]


# ---- export.py -----------------------------------------------------------------------------------------------------


def run_folder(tmp_path, model):
    """The folder of a run, as far as export.py reads it before it starts Ray."""
    Log(settings(tmp_path, model)).metrics.close()
    os.makedirs(tmp_path / "runs/a/checkpoints/step_1")
    return str(tmp_path / "runs/a")


def exported(argv, capsys):
    """The one line that export.py ends with, before it starts Ray."""
    assert export.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1
    return err


def test_export_says_which_folder_is_gone(tmp_path, capsys):
    """Fails if a model that has moved since the run ends in the hub's traceback about a repository id."""
    model = copied(tmp_path / "model")
    run = run_folder(tmp_path, model)
    shutil.rmtree(model)
    said = exported([run, "1"], capsys)
    assert f"model='{model}', from which the run started, is gone: --model=FOLDER" in said
    assert "neither a hub name nor a folder" in exported([run, "1", f"--model={tmp_path}/none"], capsys)
    other = copied(tmp_path / "other")
    train_a_little(other)
    assert "another model (other weights)" in exported([run, "1", f"--model={other}"], capsys)
    for usage in ([run], [run, "1", "--modle=x"], [run, "1", "--model="]):
        assert "export.py runs/NAME STEP [--model=FOLDER]" in exported(usage, capsys)


def test_export_takes_the_new_place(tmp_path, monkeypatch, capsys):
    """Fails if --model is used for the policy only, so that the critic, which started from the same folder, is looked
    for in the old one."""
    model = copied(tmp_path / "model")
    run = run_folder(tmp_path, model)
    model.rename(tmp_path / "moved")

    class ReachedRay(Exception):
        pass

    def stop(log):
        raise ReachedRay

    monkeypatch.setattr(export, "start_ray", stop)
    with pytest.raises(ReachedRay):
        export.main([run, "1", f"--model={tmp_path}/moved"])
    found = json.loads(Path(run, "config.json").read_text())
    assert found["model"] == found["critic_model"] == f"{tmp_path}/moved"
