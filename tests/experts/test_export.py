"""Exported folders of all families: the right config and size, and equal logits in a process without genlight."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from experts.tiny_models import GROUPED, KEPT, NAMES, logits, random_maps, state, tiny_model, tokens
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from genlight.experts.editor import ExpertEditor
from genlight.experts.export import check_exportable, config_changes, export
from genlight.experts.maps import selection_maps
from genlight.io import verify_folder

LOAD_ALL = """
import sys, torch, transformers
from pathlib import Path
from safetensors.torch import load_file, save_file
assert not any(name.startswith("genlight") for name in sys.modules)
root = Path(sys.argv[1])
ids = load_file(root / "ids.safetensors")["ids"]
found = {}
for folder in sorted(path for path in root.iterdir() if path.is_dir()):
    model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    with torch.no_grad():
        out = model(input_ids=ids, labels=ids, output_router_logits=True)
        assert torch.isfinite(out.loss)
        found[folder.name] = out.logits
        found[folder.name + "/parameters"] = torch.tensor(sum(p.numel() for p in model.parameters()))
        if hasattr(model, "num_experts"):
            assert model.num_experts == len(model.model.layers[-1].mlp.experts.down_proj)
save_file(found, root / "found.safetensors")
"""


def cases(name: str) -> dict[str, Any]:
    """Edits of one family: pruned, merged, fewer active experts, and without groups."""
    edits: dict[str, Any] = {
        "pruned": ({n: selection_maps(KEPT, 8) for n in ("all",)}, {}),
        "merged": ({"all": random_maps(5)}, {}),
        "one_active": ({"all": selection_maps(KEPT, 8)}, {"num_experts_per_tok": 1}),
    }
    if name in GROUPED:
        edits["ungrouped"] = ({"all": selection_maps([0, 1, 6], 8)}, {"ungroup": True})
    return edits


def test_folders_load_in_plain_transformers_with_equal_logits(tmp_path: Path) -> None:
    """One process for all, because importing takes longer than anything else."""
    expected, parameters = {}, {}
    save_file({"ids": tokens()}, tmp_path / "ids.safetensors")
    for name in NAMES:
        for case, (maps, routing) in cases(name).items():
            model = tiny_model(name)
            full, held = logits(model), state(model)
            editor = ExpertEditor(model)
            editor.apply(dict.fromkeys(editor.layers, maps["all"]), **routing)
            key = f"{name}-{case}"
            expected[key], parameters[key] = logits(model), editor.num_parameters()
            export(editor, tmp_path / key)
            verify_folder(tmp_path / key)
            assert torch.equal(logits(model), expected[key])
            editor.restore()
            assert torch.equal(logits(model), full) and state(model) == held
            assert model.config.num_experts_per_tok == 2 and getattr(model.config, editor.family.count_field) == 8
    program = [sys.executable, "-c", LOAD_ALL, str(tmp_path)]
    subprocess.run(program, check=True, cwd=tmp_path, timeout=250)
    found = load_file(tmp_path / "found.safetensors")
    assert len(expected) == 3 * len(NAMES) + len(GROUPED)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")
        assert int(found[f"{key}/parameters"]) == parameters[key], key
    for name in NAMES:
        config = json.loads((tmp_path / f"{name}-one_active" / "config.json").read_text())
        assert config["num_experts_per_tok"] == 1
        counts = [config.get(k) for k in ("num_local_experts", "num_experts", "n_routed_experts") if k in config]
        assert counts == [4]


@pytest.mark.parametrize("name", NAMES)
def test_whatever_reads_the_full_model_reads_the_pruned_one(name: str, tmp_path: Path) -> None:
    """Its config.json differs in the counts alone, and its tensors have names that the full model has."""
    model = tiny_model(name)
    model.save_pretrained(tmp_path / "full")
    editor = ExpertEditor(model)
    editor.apply(dict.fromkeys(editor.layers, selection_maps(KEPT, 8)), num_experts_per_tok=1)
    changes = config_changes(editor)
    export(editor, tmp_path / "pruned")
    full, pruned = (json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("full", "pruned"))
    assert set(changes) == {editor.family.count_field, "num_experts_per_tok"}
    written = {model.config.attribute_map.get(field, field): value for field, value in changes.items()}
    assert written.keys() <= full.keys() and pruned == full | written
    names = [set(load_file(tmp_path / folder / "model.safetensors")) for folder in ("full", "pruned")]
    assert names[1] <= names[0] and len(names[1]) > 0


def test_size_is_as_predicted(tmp_path: Path) -> None:
    """Experts hold E'/E of the full model's numbers; a file holds four bytes a number."""
    model = tiny_model("mixtral")
    editor = ExpertEditor(model)
    full = editor.num_parameters()
    assert full == sum(p.numel() for p in model.parameters())
    export(editor, tmp_path / "full")
    editor.apply(dict.fromkeys(editor.layers, selection_maps([1, 6], 8)))
    export(editor, tmp_path / "small")
    experts = 2 * 8 * (3 * 48 * 32 + 32)
    assert full - editor.num_parameters() == experts * 3 // 4
    sizes = {}
    for folder in ("full", "small"):
        with safe_open(tmp_path / folder / "model.safetensors", "pt") as file:
            sizes[folder] = sum(file.get_tensor(key).numel() for key in file.keys())  # noqa: SIM118
    assert sizes == {"full": full, "small": full - experts * 3 // 4}


def test_what_plain_transformers_cannot_do_is_refused(tmp_path: Path) -> None:
    editor = ExpertEditor(tiny_model("mixtral"))
    first, second = editor.layers
    editor.prune(first, KEPT)
    with pytest.raises(ValueError, match="different numbers of experts"):
        export(editor, tmp_path / "model")
    assert not (tmp_path / "model").exists()
    editor.prune(second, [0, 1, 2, 3])
    assert config_changes(editor) == {"num_local_experts": 4}
    for name, maps, allowed in [
        ("mixtral", selection_maps(KEPT, 8), True),
        ("mixtral", random_maps(0), False),
        ("qwen2_moe", selection_maps(KEPT, 8), False),
    ]:
        editor = ExpertEditor(tiny_model(name), router_mapping="post_softmax")
        editor.apply(dict.fromkeys(editor.layers, maps))
        if allowed:
            check_exportable(editor)
        else:
            with pytest.raises(ValueError, match="use router_mapping = 'logits'"):
                check_exportable(editor)


def test_a_folder_that_is_there_is_kept(tmp_path: Path) -> None:
    editor = ExpertEditor(tiny_model("mixtral"))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError):
        export(editor, tmp_path / "model")
    assert (tmp_path / "model" / "mine.txt").read_text() == "mine"
    export(editor, tmp_path / "model", replace=True)
    assert (tmp_path / "model" / "config.json").exists() and not (tmp_path / "model" / "mine.txt").exists()


def test_the_model_is_given_back_when_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("mixtral")
    held = state(model)
    editor = ExpertEditor(model)
    editor.apply(dict.fromkeys(editor.layers, random_maps(2)))

    def fail(_: Path) -> None:
        raise OSError("no room")

    monkeypatch.setattr(model, "save_pretrained", fail)
    with pytest.raises(OSError, match="no room"):
        export(editor, tmp_path / "model")
    assert state(model) == held and model.config.num_local_experts == 8 and not list(tmp_path.iterdir())


@pytest.mark.gpu
def test_vllm_answers_as_the_pruned_model_does(tmp_path: Path) -> None:
    vllm = pytest.importorskip("vllm")
    # heads of a size that its kernels have
    model = tiny_model("mixtral", hidden_size=256, intermediate_size=256)
    editor = ExpertEditor(model)
    editor.apply(dict.fromkeys(editor.layers, selection_maps(KEPT, 8)))
    export(editor, tmp_path / "model")
    served = vllm.LLM(str(tmp_path / "model"), skip_tokenizer_init=True, dtype="float32", enforce_eager=True)
    greedy = vllm.SamplingParams(temperature=0, max_tokens=4, detokenize=False)
    (answer,) = served.generate([{"prompt_token_ids": tokens(1)[0].tolist()}], greedy)
    expected = model.generate(tokens(1), max_new_tokens=4, do_sample=False)[0, -4:]
    assert list(answer.outputs[0].token_ids) == expected.tolist()
