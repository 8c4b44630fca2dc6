"""The page on adding a model, followed to the letter."""

from command_line import report_of, untrained_features
from docs.pages import files_of, follow
from safetensors.torch import load_file

PAGE = "docs/add_a_model.md"


def test_the_page_can_be_followed(tmp_path, monkeypatch):
    assert set(files_of(PAGE)) == {"tiny_vae/module.py", "my_conf/module/tiny_vae.yaml", "test_tiny_vae.py"}
    monkeypatch.setenv("GENLIGHT_CACHE", str(tmp_path / "cache"))
    untrained_features(tmp_path / "cache")
    assert len(follow(PAGE, tmp_path, monkeypatch)) == 3
    fit, validate = (tmp_path / "runs" / "vae" / name for name in ("fit", "validate"))
    assert load_file(fit / "artifact" / "decoder.safetensors")["2.weight"].shape == (64, 128)
    assert 'load_file("decoder.safetensors")' in (fit / "artifact" / "README.md").read_text()
    assert "val/fd_digits" in report_of(validate)["metrics"] and (validate / "figures" / "samples.png").is_file()
