"""The README's example runs as it is printed, and the README names only what exists."""

import re
from pathlib import Path

import peft
import pytest
import torch
from tiny import lm_batch, tiny_llama
from tiny_run import write_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from adazeta import TTConfig

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
STATUS = (ROOT / "docs" / "status.md").read_text(encoding="utf-8")


def test_the_example_runs_and_changes_the_adapter(tmp_path):
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len([line for line in example.splitlines() if line.strip()]) <= 12
    texts, labels = ["a warm film", "dull", "bright and moving", "a tired one"], torch.tensor([1, 0, 1, 0])
    names = {"folder": write_model(tmp_path / "model"), "batches": [(texts, labels)] * 3}
    exec(compile(example, "README.md", "exec"), names)
    opt, model = names["opt"], names["model"]
    assert opt.step_index == 3
    assert opt.rows == 3 * 4 * 4 * 2
    assert 0 < names["loss"] < 20
    theta = torch.cat([p.detach().flatten() for n, p in model.named_parameters() if "tt_theta" in n])
    assert torch.isfinite(theta).all()
    assert (theta == 0).float().mean() < 0.05  # the zero core of the identity has moved


def test_files_and_tests_that_the_readme_names_exist():
    for link in re.findall(r"\]\(((?!https?:)[^)#]+)\)", README):
        if not link.startswith("docs/images/"):  # the picture is made by the demo
            assert (ROOT / link).is_file(), link
    for path in re.findall(r"tests/\w+/\w+\.py", README + STATUS):
        assert (ROOT / path).is_file(), path


def test_commands_that_the_readme_names_exist():
    from adazeta.cli import build_parser

    commands = next(iter(build_parser()._subparsers._group_actions)).choices
    named = set(re.findall(r"[`/]adazeta ([a-z]+)", README + STATUS))
    assert {"predict", "replay", "info", "train"} <= named
    assert named <= set(commands), named - set(commands)
    targets = set(re.findall(r"^make (\w+)", README, re.MULTILINE))
    makefile = (ROOT / "Makefile").read_text()
    assert targets == {"demo", "test"}
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


def test_the_guide_shows_a_yaml_file_that_is_read(tmp_path):
    from adazeta import options

    guide = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```yaml\n(.*?)```", guide, re.DOTALL)
    assert blocks
    for block in blocks:
        path = tmp_path / "run.yaml"
        path.write_text(block)
        values = options.read_yaml(str(path), [*options.RUN, *options.TRAIN])
        assert values["label_words"] == {"0": " terrible", "1": " great"}


def test_parameters_that_are_no_adapters_are_trained(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "parameters.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names = {"base": tiny_llama(), "batches": [lm_batch(2, seed=k) for k in range(2)]}
    before = {name: p.clone() for name, p in names["base"].named_parameters()}
    exec(compile(example, "parameters.md", "exec"), names)
    moved = {name for name, p in names["base"].named_parameters() if not torch.equal(before[name], p)}
    assert moved == {name for name in before if "mlp" in name}
    assert (tmp_path / "tuned" / "model.safetensors").is_file()
    for path in re.findall(r"python (scripts/\w+\.py)", page):
        assert (ROOT / path).is_file(), path


def test_the_guide_aims_at_a_function(tmp_path):
    guide = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")
    section = guide.split("\n## Your own objective\n")[1].split("\n## ")[0]
    (example,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    folder = write_model(tmp_path / "model")
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder), TTConfig(rank=2, bottleneck=8))
    batches = [(["a warm film", "dull"], ["yes", "no"])] * 2
    names = {"model": model, "tokenizer": AutoTokenizer.from_pretrained(folder), "batches": batches}
    exec(compile(example, "guide.md", "exec"), names)
    assert names["opt"].step_index == 2 and names["opt"].rows == 2 * 8 * 2 * 2
    assert 1 <= names["loss"] < 1.2  # nothing right yet, and a hundredth for each letter


PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]


def anchors(page):
    """What GitHub calls the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_blocks_are_closed_and_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    assert len(re.findall(r"^```", text, re.MULTILINE)) % 2 == 0
    for target, _, anchor in (link.partition("#") for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text)):
        linked = page.parent / target if target else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), f"{target}#{anchor}"
