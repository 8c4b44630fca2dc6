"""The card is one that the Hugging Face hub can read."""

import json

import pytest
from huggingface_hub import ModelCard
from reports.test_report import record

from genlight.reports.model_card import write_model_card
from genlight.reports.report import parse_report


def test_metadata_and_text(tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    report = parse_report(record())
    write_model_card(tmp_path, report, dataset="digits", method="training", base_model="a/b", license="apache-2.0")
    card = ModelCard.load(tmp_path / "README.md")
    data = card.data
    assert (data.base_model, data.license, data.library_name) == ("a/b", "apache-2.0", "diffusers")
    results = {result.metric_type: result for result in data.eval_results}
    assert set(results) == {"fd_digits", "kid_digits", "is_digits"}
    assert results["fd_digits"].metric_value == 0.9
    assert results["fd_digits"].metric_name == "fd_digits"
    for part in ("python -m genlight validate", "Method: training", "inherited from the base model", "from_pretrained"):
        assert part in card.text
    assert "FID" not in str(card)


def test_no_two_results_have_one_name(tmp_path):
    """Tasks of a language model have the same quantities; what a method was before has a name of its own too."""
    metrics = {"val/a/accuracy": 0.5, "val/b/accuracy": 0.25, "a/accuracy_full": 0.75, "val/accuracy": 0.4}
    write_model_card(tmp_path, parse_report(record(metrics=metrics, features=None, floor=None)), dataset="tasks")
    results = ModelCard.load(tmp_path / "README.md").data.eval_results
    names = ["a/accuracy", "b/accuracy", "a/accuracy_full", "accuracy"]
    assert [(r.metric_name, r.metric_value) for r in results] == list(zip(names, metrics.values(), strict=True))


def test_the_example_of_an_export_is_kept(tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    (tmp_path / "README.md").write_text("# Export\n\n```python\nexact(arguments=4)\n```\n\nIt needs diffusers.\n")
    write_model_card(tmp_path, parse_report(record()), dataset="digits")
    text = (tmp_path / "README.md").read_text()
    assert text.count("exact(arguments=4)") == 1 and "It needs diffusers." in text and "path/to" not in text


def test_a_classifier_is_no_diffusers_pipeline(tmp_path):
    (tmp_path / "classifier.safetensors").write_bytes(b"")
    write_model_card(tmp_path, parse_report(record(metrics={}, floor=None, features=None)), dataset="digits")
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "genlight" and card.data.eval_results is None
    assert 'load_file("classifier.safetensors")' in card.text and "diffusers" not in card.text.replace(
        "diffusers 0", ""
    )


def test_a_model_from_nothing_states_no_licence_of_others(tmp_path):
    write_model_card(tmp_path, parse_report(record(metrics={})), dataset="digits", how_to_load="Like this.")
    text = (tmp_path / "README.md").read_text()
    assert "none, trained from random weights" in text and "Licence: not stated" in text and "Like this." in text


def test_a_folder_with_searched_schedules_says_how_it_loads(tmp_path):
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "solver_schedule.py").write_text("")
    (tmp_path / "model_index.json").write_text("{}")
    write_model_card(tmp_path, parse_report(record()), dataset="digits")
    text = (tmp_path / "README.md").read_text()
    assert "trust_remote_code=True" in text and "available_steps" in text


def card_of(folder, base, **given):
    folder.mkdir(exist_ok=True)
    write_model_card(folder, parse_report(record()), dataset="digits", base_model=base, **given)
    return ModelCard.load(folder / "README.md")


def base_model(folder, metadata):
    """A folder with a card of its own."""
    folder.mkdir()
    (folder / "README.md").write_text(f"---\n{metadata}---\n\n# Base\n")
    return str(folder)


def test_the_licence_of_a_base_model_goes_on_and_on(tmp_path):
    base = base_model(tmp_path / "base", "license: mit\n")
    first = card_of(tmp_path / "first", base)
    assert first.data.license == "mit" and "Licence: mit (inherited from the base model)" in first.text
    assert card_of(tmp_path / "second", str(tmp_path / "first")).data.license == "mit"
    # a path of this machine is no model of the hub
    assert first.data.base_model is None and base in first.text


def test_the_card_of_a_run_is_that_of_its_artifact(tmp_path):
    (tmp_path / "run").mkdir()
    base_model(tmp_path / "run" / "artifact", "license: apache-2.0\n")
    assert card_of(tmp_path / "made", str(tmp_path / "run")).data.license == "apache-2.0"


def test_a_licence_of_its_own_keeps_name_and_link(tmp_path):
    text = "license: other\nlicense_name: some-community\nlicense_link: https://example.org/l\n"
    card = card_of(tmp_path / "made", base_model(tmp_path / "base", text))
    assert (card.data.license, card.data.license_name) == ("other", "some-community")
    assert "some-community https://example.org/l" in card.text and "terms of its own" in card.text


@pytest.mark.parametrize(
    ("metadata", "warning"),
    [
        ("license: cc-by-nc-nd-4.0\n", "do not publish this folder"),
        ("license: cc-by-nc-4.0\n", "commercial use"),
        ("tags: [a]\n", "not stated by the base model"),
        ("license: [mit]\n", "not stated by the base model"),
        ("license: {a: [\n", "not stated by the base model"),
    ],
)
def test_what_a_licence_forbids_or_leaves_open_is_said(tmp_path, metadata, warning):
    assert warning in card_of(tmp_path / "made", base_model(tmp_path / "base", metadata)).text


def test_licences_that_differ_are_listed_and_none_is_chosen(tmp_path):
    bases = [base_model(tmp_path / name, f"license: {name}\n") for name in ("mit", "apache-2.0")]
    card = card_of(tmp_path / "made", bases)
    assert card.data.license is None
    assert all(
        f"Licence of {base}: {name}" in card.text for base, name in zip(bases, ("mit", "apache-2.0"), strict=True)
    )


def test_a_model_of_the_hub_is_named_in_the_metadata(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert card_of(tmp_path / "made", ["a/b", "c/d", "runs/x/fit"]).data.base_model == ["a/b", "c/d"]


def test_what_a_folder_is_decides_library_and_task(tmp_path):
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "config.json").write_text(json.dumps({"architectures": ["MixtralForCausalLM"]}))
    card = card_of(tmp_path / "made", None)
    assert card.data.library_name == "transformers"
    assert {result.task_type for result in card.data.eval_results} == {"text-generation"}


@pytest.mark.parametrize(
    ("files", "task"),
    [
        ({"model_index": {"_class_name": "StableDiffusionPipeline"}}, "text-to-image"),
        ({"model_index": {"_class_name": "LattePipeline"}}, "text-to-video"),
        ({"model_index": {"_class_name": "DiTPipeline"}}, "class-conditional-image-generation"),
        ({"model_index": {"_class_name": "DDPMPipeline"}}, "unconditional-image-generation"),
        # of these the class does not tell
        (
            {"model_index": {"_class_name": "ConsistencyModelPipeline"}, "genlight": {"num_classes": 10}},
            "class-conditional-image-generation",
        ),
        (
            {"model_index": {"_class_name": ["pipeline", "GenerationPipeline"]}, "genlight": {"num_classes": None}},
            "unconditional-image-generation",
        ),
        ({"config": {"student": {"transformer": {"num_classes": 10}}}}, "class-conditional-image-generation"),
        ({"autoregressive": {"network": {"config": {"num_classes": 10, "text_dim": 8}}}}, "text-to-image"),
    ],
)
def test_the_task_is_what_the_model_is_told(tmp_path, files, task):
    (tmp_path / "made").mkdir()
    for name, content in files.items():
        (tmp_path / "made" / f"{name}.json").write_text(json.dumps(content))
    assert {result.task_type for result in card_of(tmp_path / "made", None).data.eval_results} == {task}
