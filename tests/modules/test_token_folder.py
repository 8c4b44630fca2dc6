"""What is read is what was saved, bit for bit, and what is wrong with a folder is said."""

import copy
import json
from pathlib import Path

import pytest
import torch
from modules.tiny_token_teacher import tiny_captions
from modules.tiny_token_teacher import tiny_teacher as captioned_teacher
from modules.tiny_tokens import CLASSES, CODE_DIM, saved, tiny_teacher, tiny_tokenizer, tiny_transformer

from genlight.errors import UserError
from genlight.io import save_tensors
from genlight.modules.token_folder import (
    SavedTokenizer,
    model_of,
    read_token_teacher,
    read_tokenizer,
    save_token_teacher,
    save_tokenizer,
)
from genlight.nets.vq import VectorQuantizer
from genlight.nets.vq_tokenizer import VQTokenizer

KINDS = ["llamagen", "var"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_tokenizer_comes_back(kind: str, tmp_path: Path) -> None:
    tokenizer, images = saved(kind), torch.rand(5, 1, 8, 8) * 2 - 1
    save_tokenizer(tmp_path, tokenizer)
    found = read_tokenizer(tmp_path)
    assert found.image_shape == tokenizer.image_shape
    tokens = tokenizer.network.eval().encode(images)
    assert torch.equal(found.network.encode(images), tokens)
    # without gradients torch may add in another order
    torch.testing.assert_close(found.network.decode(tokens), tokenizer.network.decode(tokens))
    assert tokens.shape == (5, found.num_tokens)
    assert not any(parameter.requires_grad for parameter in found.network.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_a_teacher_comes_back_from_its_folder_or_its_run(kind: str, tmp_path: Path) -> None:
    teacher = tiny_teacher(kind, guidance_scale=1.5, top_k=7)
    save_token_teacher(tmp_path / "artifact", teacher)
    (tmp_path / "run.json").write_text("{}")
    label = torch.arange(3)
    for folder in (tmp_path, tmp_path / "artifact"):
        found = read_token_teacher(folder)
        assert found.settings == teacher.settings and found.noise_shape == teacher.noise_shape
        assert found.num_classes == CLASSES and found.noise_shape[1] == CODE_DIM
        assert found.tokenizer.quantizer is found.model.quantizer
        tokens = torch.randint(0, 12, (3, found.noise_shape[0]))
        assert torch.equal(found.model.logits(tokens, label), teacher.model.logits(tokens, label))
        assert found.fingerprint == teacher.fingerprint
        assert copy.deepcopy(found) is found


def test_a_teacher_of_texts_brings_its_captions(tmp_path: Path) -> None:
    teacher = captioned_teacher("captioned")
    save_token_teacher(tmp_path, teacher)
    found = read_token_teacher(tmp_path)
    assert found.fingerprint == teacher.fingerprint and found.num_classes == 10
    assert found.captions is not None and torch.equal(found.captions, tiny_captions())
    label, tokens = torch.tensor([9, 4]), torch.zeros(2, 16, dtype=torch.long)
    assert torch.equal(found.model.logits(tokens, label), teacher.model.logits(tokens, label))
    save_tensors(tmp_path / "captions.safetensors", {"captions": tiny_captions().flip(0)})
    assert read_token_teacher(tmp_path).fingerprint != teacher.fingerprint
    save_tensors(tmp_path / "captions.safetensors", {"captions": tiny_captions()[:, 1:]})
    with pytest.raises(UserError, match=r"captions \[10, 4, 6\] must be \[P, 5, 6\]"):
        read_token_teacher(tmp_path)
    (tmp_path / "captions.safetensors").unlink()
    with pytest.raises(UserError, match=r"is a network of texts and has no captions\.safetensors"):
        read_token_teacher(tmp_path)


def test_the_fingerprint_is_of_weights_and_settings() -> None:
    teacher = tiny_teacher()
    assert tiny_teacher().fingerprint == teacher.fingerprint
    assert tiny_teacher(top_k=3).fingerprint != teacher.fingerprint
    for part in ("transformer", "quantizer"):
        other = tiny_teacher()
        with torch.no_grad():
            next(getattr(other.model, part).parameters()).view(-1)[0] += 1e-3
        assert other.fingerprint != teacher.fingerprint


def test_networks_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match="several scales"):
        model_of(tiny_transformer("var"), tiny_tokenizer("llamagen"))
    with pytest.raises(ValueError, match="one scale"):
        model_of(tiny_transformer("llamagen"), tiny_tokenizer("var"))
    wider = VQTokenizer(VectorQuantizer(13, 4), (8,), 8, image_channels=1, norm_num_groups=4)
    with pytest.raises(ValueError, match=r"network.num_codes = 12 must be 13"):
        model_of(tiny_transformer(), wider)
    assert SavedTokenizer(wider, (1, 6, 6)).num_tokens == 36


def test_a_wrong_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tokenizer\.json is missing"):
        read_tokenizer(tmp_path)
    save_tokenizer(tmp_path, saved())
    with pytest.raises(UserError, match=r"autoregressive\.json is missing"):
        read_token_teacher(tmp_path)
    file = tmp_path / "tokenizer.json"
    record = json.loads(file.read_text())
    for change, message in (
        ({"version": 2}, "version 1"),
        ({"quantizer": {"class": "os.system", "config": {}}}, "known"),
        ({"config": record["config"] | {"channels": [9]}}, "norm_num_groups"),
        ({"config": record["config"] | {"latent_channels": 16}}, "shape"),
    ):
        file.write_text(json.dumps(record | change))
        with pytest.raises(UserError, match=message):
            read_tokenizer(tmp_path)
    file.write_text(json.dumps(record))
    weights = tmp_path / "tokenizer.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(UserError, match="truncated or altered"):
        read_tokenizer(tmp_path)
    weights.unlink()
    with pytest.raises(UserError, match=r"no tokenizer\.safetensors"):
        read_tokenizer(tmp_path)
