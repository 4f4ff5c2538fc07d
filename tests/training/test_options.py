"""Settings from flags and from YAML files, and what the help says about them."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_run import fails, main

from adazeta import cli, options
from adazeta.kinds import layers
from adazeta.option import plain
from adazeta.schedule import AdaptiveQueries


def test_yaml_takes_the_keys_of_the_flags_and_flags_win(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "steps: 7\nlr: 1e-3\nlabel-words: {bad: terrible, good: great}\nqueries: adaptive:1,0.5,8,step\n"
        "eval_every: 5\nbias: false\nlayers: [0, 2]\n"
    )
    from_file = options.read_yaml(str(path), options.TRAIN)
    values = options.resolve({"steps": "9"}, options.TRAIN, preset="paper", from_file=from_file)
    assert (values["steps"], values["lr"], values["eval_every"]) == (9, 1e-3, 5)
    assert values["label_words"] == {"bad": " terrible", "good": " great"}
    assert options.section("zo", values, "paper")["queries"] == AdaptiveQueries(1, 0.5, 8, "step")
    assert options.section("zo", values, "paper")["eps"] == options.PRESETS["paper"].zo["eps"]
    tt = options.section("tt", values, "paper")
    assert (tt["bias"], tt["layers_to_transform"]) == (False, [0, 2])
    stored = {key: plain(value) for key, value in values.items()}
    assert options.resolve({}, options.TRAIN, stored=json.loads(json.dumps(stored))) == values


def test_a_run_from_a_file_alone(world, capsys, tmp_path):
    folder, _ = world
    path = tmp_path / "run.yaml"
    path.write_text(
        f"model: {folder / 'base'}\ndata: {folder / 'data.jsonl'}\noutput: {tmp_path / 'run'}\npreset: paper\n"
        "steps: 2\nbatch-size: 4\nrank: 2\nbottleneck: 8\n"
    )
    code, out, err = main(capsys, "train", "--config", path, "--steps", 3)
    assert (code, "3 steps, 24 forward rows" in out) == (0, True), err
    assert json.loads((tmp_path / "run" / "adazeta.json").read_text())["preset"] == "paper"
    assert "already: add --overwrite" in fails(capsys, "train", "--config", path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("learning_rates: 1\n", "unknown key 'learning_rates'"),
        ("quries: 1\n", "unknown key 'quries': did you mean queries?"),
        ("steps: many\n", "key steps: "),
        ("seed: 1.9\n", "key seed: expected an integer, got 1.9"),
        ("seed: true\n", "key seed: expected an integer, got True"),
        ("shots-seed: .nan\n", "key shots-seed: expected an integer, got nan"),
        ("steps: .inf\n", "key steps: expected an integer, got inf"),
        ("preset: best\n", "key preset: expected one of default, paper"),
        ("- steps\n", "expected 'key: value' lines, got list"),
        ("steps: [\n", "is not YAML"),
        (
            "label-words: {positive: Yes, negative: No}\n",
            "key label-words: expected text, got True: YAML reads Yes, No",
        ),
        ("label-words: {yes: good, no: bad}\n", "key label-words: expected text, got True: YAML reads Yes, No"),
        ("labels: [off, on]\n", "key labels: expected text, got False: YAML reads Yes, No"),
        ("labels: no\n", "key labels: expected text, got False: YAML reads Yes, No"),
        ("label-names: [good, null]\n", "key label-names: expected text, got None: YAML reads Yes, No"),
        ("skip-labels: [no]\n", "key skip-labels: expected text, got False: YAML reads Yes, No"),
        ("columns: {text: yes}\n", "key columns: expected text, got True: YAML reads Yes, No"),
    ],
)
def test_bad_yaml(tmp_path, content, message, capsys):
    path = tmp_path / "run.yaml"
    path.write_text(content)
    assert message in fails(capsys, "train", "--config", path)
    assert "cannot read the settings file" in fails(capsys, "train", "--config", tmp_path / "none.yaml")


def test_words_in_quotation_marks_and_settings_that_are_truth_values(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        'label-words: {positive: "Yes", negative: \'No\'}\nlabels: ["yes", "no"]\nlabel-names: [0, 1]\n'
        "bias: off\nnormalize: no\noverwrite: yes\ngroup-by-length: false\ntest: true\n"
    )
    values = options.read_yaml(str(path), [*options.RUN, *options.TRAIN])
    assert values["label_words"] == {"positive": " Yes", "negative": " No"}
    assert (values["labels"], values["label_names"]) == (["yes", "no"], ["0", "1"])
    assert [values[name] for name in ("bias", "normalize", "group_by_length")] == [False] * 3
    assert values["overwrite"] is values["test"] is True


def test_every_option_goes_to_a_field_that_exists():
    from dataclasses import fields

    from transformers import TrainingArguments

    from adazeta import TTConfig, ZOConfig

    known = {"tt": TTConfig, "zo": ZOConfig, "train": TrainingArguments}
    for option in options.TRAIN:
        if option.goes_to:
            name, _, field = option.goes_to.partition(".")
            assert field in {entry.name for entry in fields(known[name])}, option
    for preset in options.PRESETS.values():
        for name, kind in known.items():
            assert set(getattr(preset, name)) <= {entry.name for entry in fields(kind)}


def test_every_flag_has_help_with_a_default(capsys):
    for command in ("train", "eval", "predict", "templates", "info", "replay", "journal", "demo", "fetch"):
        parser = next(iter(cli.build_parser()._subparsers._group_actions)).choices[command]
        for action in parser._actions:
            if action.option_strings and action.dest != "help":
                assert re.search(r"\(default: .+\)|\(preset .+\)", action.help), (command, action.option_strings)
            assert action.help
        with pytest.raises(SystemExit) as stopped:
            cli.main([command, "--help"])
        assert stopped.value.code == 0
    assert main(capsys)[0] == 2


def test_help_needs_no_torch():
    root = Path(__file__).resolve().parents[2]
    code = (
        "import sys\nfrom adazeta import cli\ntry: cli.main(['train', '--help'])\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'peft', 'matplotlib', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    environment = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{root / 'python'}"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("given", ["top", "5-2", "", "1,,2", "-3", "1.5"])
def test_blocks_that_are_none(given):
    with pytest.raises(ValueError, match=f"expected middle, or blocks such as 0-5,29, got '{given}'"):
        layers(given)
    assert layers("0-2, 5") == layers([0, 1, 2, 5]) == [0, 1, 2, 5]
