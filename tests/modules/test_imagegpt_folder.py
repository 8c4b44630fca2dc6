"""ImageGPT's folders as teachers: what is read, what is refused, and pairs, student and samples of it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from modules.test_distilled_decoding import ALONE
from modules.tiny_imagegpt import COLOURS, saved_imagegpt, tiny_colours, tiny_imagegpt
from nets.test_teachers import randomised
from transformers import ImageGPTConfig, ImageGPTForCausalImageModeling
from transformers.models.imagegpt.image_processing_pil_imagegpt import ImageGPTImageProcessorPil

from genlight.data.digits import DigitsDataModule
from genlight.data.pairs import PairsDataModule
from genlight.errors import UserError
from genlight.io import atomic_write_json, read_json
from genlight.modules.distilled_decoding import DistilledDecodingModule
from genlight.modules.token_folder import read_token_teacher, save_token_teacher
from genlight.nets.autoregressive import SamplingSettings, parallel_probabilities


def test_a_folder_of_transformers_is_a_teacher(tmp_path: Path) -> None:
    folder = saved_imagegpt(tmp_path / "gpt")
    teacher = read_token_teacher(folder)
    assert teacher.num_classes is None and teacher.image_shape == (3, 4, 4) and teacher.noise_shape == (16, 3)
    assert teacher.settings == SamplingSettings()
    torch.testing.assert_close(teacher.model.codebook, tiny_colours())
    tokens = torch.randint(0, COLOURS, (2, 16))
    with torch.no_grad():
        start = torch.full((2, 1), COLOURS)
        wanted = tiny_imagegpt()(torch.cat((start, tokens[:, :-1]), 1)).logits.softmax(-1)
    found = parallel_probabilities(teacher.model, tokens, torch.zeros(2, dtype=torch.long), teacher.settings)
    torch.testing.assert_close(found, wanted)
    # another way to sample is another teacher, another version of transformers is not
    config = read_json(folder / "config.json")
    atomic_write_json(folder / "config.json", config | {"transformers_version": "4.0.0"})
    assert read_token_teacher(folder).fingerprint == teacher.fingerprint
    atomic_write_json(folder / "generation_config.json", {"temperature": 0.9, "top_k": 4, "do_sample": True})
    other = read_token_teacher(folder)
    assert other.settings == SamplingSettings(temperature=0.9, top_k=4) and other.fingerprint != teacher.fingerprint
    with pytest.raises(ValueError, match="saved by transformers"):
        save_token_teacher(tmp_path / "copy", teacher)


def test_a_folder_that_names_no_filter_is_sampled_as_transformers_samples_it(tmp_path: Path) -> None:
    """Of 80 colours that are almost as likely as each other the library draws from some only, unless it is told 0."""
    torch.manual_seed(0)
    config = ImageGPTConfig(vocab_size=81, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    network: Any = ImageGPTForCausalImageModeling(config).eval()
    network.save_pretrained(tmp_path)
    ImageGPTImageProcessorPil(clusters=torch.rand(80, 3).tolist()).save_pretrained(tmp_path)
    start = torch.full((3000, 1), 80)
    for record, count in ((None, 50), ({"top_k": 0}, 80), ({"top_k": 7}, 7), ({"top_k": 99}, 80)):
        if record is not None:
            atomic_write_json(tmp_path / "generation_config.json", record)
            network = ImageGPTForCausalImageModeling.from_pretrained(tmp_path).eval()
        drawn = network.generate(start, max_new_tokens=1, do_sample=True)[:, 1].unique()
        teacher = read_token_teacher(tmp_path)
        tokens, label = torch.zeros(1, 16, dtype=torch.long), torch.zeros(1, dtype=torch.long)
        found = parallel_probabilities(teacher.model, tokens, label, teacher.settings)[0, 0].nonzero()[:, 0]
        assert len(drawn) == count and torch.equal(drawn, found)


def test_what_a_folder_lacks_is_named(tmp_path: Path) -> None:
    folder = saved_imagegpt(tmp_path / "gpt")
    kept = {path.name: path.read_bytes() for path in folder.iterdir()}
    processor, config = json.loads(kept["preprocessor_config.json"]), json.loads(kept["config.json"])

    def refused(message: str, **changes: bytes | dict | None) -> None:
        for name, data in kept.items():
            (folder / name).write_bytes(data)
        for stem, change in changes.items():
            path = folder / (stem if stem == "model" else f"{stem}.json")
            path = path.with_suffix(".safetensors") if stem == "model" else path
            if change is None:
                path.unlink()
            else:
                path.write_bytes(change if isinstance(change, bytes) else json.dumps(change).encode())
        with pytest.raises(UserError, match=message):
            read_token_teacher(folder)

    refused(r"no preprocessor_config\.json with clusters", preprocessor_config=None)
    refused(r"no preprocessor_config\.json with clusters", preprocessor_config=processor | {"clusters": None})
    refused(r"vocab_size = 10 must be 9", preprocessor_config=processor | {"clusters": processor["clusters"][:-1]})
    refused("clusters must be in", preprocessor_config=processor | {"clusters": [[0, 128, 255]] * COLOURS})
    refused("no weights as safetensors", model=None)
    refused("cannot be loaded as an ImageGPT", model=kept["model.safetensors"][:-8])
    refused("do not fit its config", config=config | {"n_layer": 3})
    refused(r"neither an ImageGPT nor .* \(gpt2\)", config=config | {"model_type": "gpt2"})
    refused("top_p = 2", generation_config={"top_p": 2.0})
    with pytest.raises(UserError, match=r"autoregressive\.json is missing"):
        read_token_teacher(tmp_path / "nothing")


def test_pairs_student_and_samples_of_an_imagegpt(tmp_path: Path) -> None:
    """From the teacher's folder to a folder of the student's that needs torch alone."""
    folder = str(saved_imagegpt(tmp_path / "gpt", size=8))
    images = DigitsDataModule(
        image_size=8, channels=3, num_classes=None, batch_size=4, eval_batch_size=8, num_samples=8, seed=0
    )
    data = PairsDataModule(
        images, folder, num_pairs=12, batch_size=4, seed=1, shard_size=12, cache=str(tmp_path / "cache")
    )
    torch.manual_seed(0)
    module = DistilledDecodingModule(folder, timesteps=(0, 2))
    module.check_data(data)
    assert module.sample_shape == (64, 3) and module.image_shape == (3, 8, 8)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert batch["label"].eq(0).all() and batch["tokens"].shape == (4, 64)
    losses = module.losses(**batch)
    assert all(torch.isfinite(value) for value in losses.values())
    randomised(module.student)
    noise = batch["noise"]
    # labels are not asked for
    made = module.sample(noise)
    assert torch.equal(made, module.sample(noise, torch.zeros(4, dtype=torch.long))) and made.shape == (4, 3, 8, 8)
    tokens = module.decode_noise(noise, None).tokens
    assert torch.equal(module.teacher.tokenizer.encode(made), tokens)
    with pytest.raises(ValueError, match="label must be from 0 to 0"):
        module.sample(noise, torch.ones(4, dtype=torch.long))
    two = module.sample(noise, timesteps=(0, 2))
    assert not torch.equal(made, two)
    module.save_pretrained(tmp_path / "student")
    given = {"noise": noise, "label": torch.zeros(4), "images": made.contiguous(), "two": two.contiguous()}
    safetensors.torch.save_file(given, tmp_path / "given.safetensors")
    # without labels: there is nothing to choose
    program = ALONE.replace('label = given["label"].long()', "label = None")
    words = [sys.executable, "-c", program, str(tmp_path / "student"), str(tmp_path / "given.safetensors")]
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.stdout.strip() == "equal", done.stderr


def test_data_with_classes_is_refused(tmp_path: Path) -> None:
    folder = str(saved_imagegpt(tmp_path / "gpt", size=8))
    images = DigitsDataModule(
        image_size=8, channels=3, num_classes=10, batch_size=4, eval_batch_size=8, num_samples=8, seed=0
    )
    data = PairsDataModule(images, folder, num_pairs=12, batch_size=4, seed=1)
    with pytest.raises(UserError, match=r"data\.num_classes = 10.*= None"):
        DistilledDecodingModule(folder).check_data(data)
    with pytest.raises(UserError, match="guidance_range must be null"):
        DistilledDecodingModule(folder, guidance_range=(1, 2)).configure_model()
