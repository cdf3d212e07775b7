"""bench/ablate.py without its runs: its arms, records, table, figure and command line. What the settings themselves do is
tested in tests/test_ppo.py and tests/test_learner.py."""

import importlib.util
import json
import subprocess
import sys

import pytest

from configs.load import ROOT, load, without_effect


@pytest.fixture
def ablate(tmp_path, monkeypatch):
    """The script as a module that writes into an empty folder."""
    spec = importlib.util.spec_from_file_location("ablate", ROOT / "bench/ablate.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "ablate", module)  # its dataclass looks up its own module there
    spec.loader.exec_module(module)
    (tmp_path / "bench/results").mkdir(parents=True)
    (tmp_path / "docs").mkdir()
    monkeypatch.setattr(module, "ROOT", tmp_path)
    return module


def all_runs(ablate, seed):
    return [ablate.Run(name, arm, seed) for name, arms in ablate.ABLATIONS.items() for arm in arms]


def test_every_arm_is_a_run_of_its_own(ablate):
    """Fails if an arm's settings are refused, which would show only after an hour, or if an arm is the baseline by
    another name."""
    settings = {}
    for run in all_runs(ablate, seed=2):
        cfg = load(run.arguments)
        assert cfg.seed == 2 and cfg.workers == 1
        assert not without_effect(cfg), run.name
        settings[run.name] = vars(cfg)
    assert len(settings) == len(all_runs(ablate, seed=2))  # Two arms of one name would share a record.
    baseline = settings.pop("baseline_seed_2")
    for run in all_runs(ablate, seed=2)[1:]:
        differing = {key for key in baseline if baseline[key] != settings[run.name][key]}
        assert differing == set(ablate.ABLATIONS[run.ablation][run.arm])


def record_of(run, accuracies):
    rows = []
    for step, accuracy in enumerate(accuracies):
        row = {"step": step, "eval/eval/accuracy": accuracy, "response_tokens": 90.0 + step, "cut_off": 0.25}
        rows.append(row | {"reward": accuracy})
    return {"settings": run.settings, "commit": "abc", "cpu_seconds": 100 + run.seed, "rows": rows}


def test_records_are_kept_and_not_made_again(ablate):
    """Fails if the record of one run replaces another's, if a finished run is made again, or if other settings count
    as the same."""
    first, second = ablate.Run("lam", "lam_0.95", 1), ablate.Run("lam", "lam_0.95", 2)
    ablate.write_record(second, record_of(second, [0.1, 0.5]))
    assert not ablate.is_recorded(first) and ablate.is_recorded(second)
    ablate.write_record(first, record_of(first, [0.1, 0.75]))
    assert ablate.is_recorded(first) and ablate.is_recorded(second)
    assert list(ablate.read_records("lam")) == ["lam_0.95_seed_1", "lam_0.95_seed_2"]
    assert ablate.read_records("lam")["lam_0.95_seed_1"] == json.loads(
        json.dumps(record_of(first, [0.1, 0.75]))
    )
    steps, values = ablate.curves(ablate.read_records("lam"), "lam_0.95", "eval/eval/accuracy")
    assert steps == [0, 1] and values.tolist() == [[0.1, 0.75], [0.1, 0.5]]
    older = record_of(first, [0.1])
    del older["settings"]["importance_cap"]  # as if this setting had come later
    ablate.write_record(first, older)
    assert ablate.is_recorded(first)
    changed = record_of(first, [0.1])
    changed["settings"]["lam"] = 0.9
    ablate.write_record(first, changed)
    with pytest.raises(SystemExit, match="made with other settings .lam.: delete it there"):
        ablate.is_recorded(first)


def test_the_figure_has_the_arms_that_have_run(ablate):
    """Fails if one arm without a record, or one run that stopped early, prevents the whole figure."""
    baseline, other = ablate.Run("baseline", "baseline", 1), ablate.Run("advantage", "grpo", 1)
    ablate.write_record(baseline, record_of(baseline, [0.1, 0.5, 0.75]))
    ablate.write_record(other, record_of(other, [0.1, 0.5]))
    ablate.draw("advantage")
    assert (ablate.ROOT / "docs/ablations/advantage.png").stat().st_size > 10_000


def test_the_table_has_means_and_deviations_over_seeds(ablate):
    """Fails if the evaluation before training counts as a step, if the deviation is not the one over seeds, or if an
    arm is missing."""
    for run, accuracies in (
        (ablate.Run("baseline", "baseline", 1), [0.9, 0.5, 0.75]),
        (ablate.Run("kl", "kl_loss", 1), [0.9, 0.25, 0.5]),
        (ablate.Run("kl", "kl_loss", 2), [0.9, 0.25, 0.7]),
    ):
        ablate.write_record(run, record_of(run, accuracies))
    lines = ablate.table("kl").splitlines()
    assert lines[2] == "| baseline | 1 | 0.750 | 0.625 | 91.5 | 0.250 | 101 |"
    assert (
        lines[3] == "| kl_loss | 2 | 0.600 ± 0.141 | 0.425 ± 0.071 | 91.5 ± 0.0 | 0.250 ± 0.000 | 102 ± 1 |"
    )
    assert lines[4].startswith("| kl_reward | none run |")


def test_an_unknown_ablation_is_refused():
    """Fails if a misspelt name runs all ablations, for hours."""
    command = [sys.executable, str(ROOT / "bench/ablate.py"), "lamda"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 1
    assert "error: 'lamda' is neither --seeds=N nor --draw nor one of baseline, lam," in ended.stderr
