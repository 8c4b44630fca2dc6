"""The card is one that the Hugging Face hub can read."""

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
    assert results["fd_digits"].metric_name == "Fréchet distance (digits features)"
    for part in ("python -m genlight validate", "Method: training", "inherited from the base model", "from_pretrained"):
        assert part in card.text
    assert "FID" not in str(card)


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
