"""Checkpoints that other programs saved: by their steps, under the module's names, refused where they differ."""

from pathlib import Path

import pytest
import torch
import transformers
from checkpoints.stand_in import live_weights, random_trajectory
from safetensors.torch import save_file

from genlight import io
from genlight.checkpoints.files import FileTrajectory, paths_of, steps_of
from genlight.checkpoints.mixing import WeightMixer
from genlight.errors import UserError

MEMBERS = random_trajectory(3, seed=4)
LIVE = {f"network.{name}": value for name, value in live_weights(MEMBERS).items()}


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Folders as training scripts leave them: of 30 and 100 steps in two files each, of 9 in one."""
    for step, tensors in zip((9, 30, 100), MEMBERS.tensors, strict=True):
        folder = tmp_path / f"checkpoint-{step}" / "unet"
        folder.mkdir(parents=True)
        held = {**tensors, "norm.running_mean": torch.zeros(2)}
        for number in range(1 + (step > 9)):
            part = {name: held[name] for name in sorted(held)[number :: 1 + (step > 9)]}
            save_file(part, folder / f"model-0000{number}.safetensors")
    return tmp_path


def opened(folder: Path, **options) -> FileTrajectory:
    return FileTrajectory.open([f"{folder}/checkpoint-*/unet"], LIVE, ["network.norm.running_mean"], **options)


def test_they_mix_as_the_trajectory_they_are(folders: Path) -> None:
    found = opened(folders)
    assert [member.last_step for member in found.members] == [9, 30, 100]
    assert set(found.names) == set(LIVE) and found.fingerprint != opened_without(folders, 9).fingerprint
    live = {name: value.clone() for name, value in LIVE.items()}
    WeightMixer(found, live).mix(torch.tensor([0.5, -1.0]).numpy())
    for name, value in live.items():
        each = [tensors[name.removeprefix("network.")] for tensors in MEMBERS.tensors]
        torch.testing.assert_close(value, 0.5 * each[0] - each[1] + 1.5 * each[2], rtol=1e-5, atol=1e-5)


def opened_without(folder: Path, step: int) -> FileTrajectory:
    return FileTrajectory.open(
        [str(path) for path in folder.glob("*/unet") if f"-{step}/" not in str(path)],
        LIVE,
        ["network.norm.running_mean"],
    )


def test_a_step_may_stand_after_a_dot() -> None:
    paths = [Path(f"run2/net.{step}") for step in (5, 10)]
    assert steps_of(paths) == dict(zip((5, 10), paths, strict=True))


def test_experts_that_are_saved_one_by_one_are_refused_with_a_way_out(tmp_path: Path) -> None:
    """transformers holds all experts of a layer in one parameter, and saves them under other names."""
    sizes = {"vocab_size": 32, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 4}
    network = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, **heads, tie_word_embeddings=True))
    live = {f"network.{name}": value for name, value in network.named_parameters()}
    for step in (1, 2):
        network.save_pretrained(tmp_path / f"checkpoint-{step}")
        save_file(dict(network.named_parameters()), tmp_path / f"raw-{step}.safetensors")
    with pytest.raises(UserError, match=r"experts\.0\.w1.* no weight of the module.*dict\(network\.named_parameters"):
        FileTrajectory.open([f"{tmp_path}/checkpoint-*"], live)
    found = FileTrajectory.open([f"{tmp_path}/raw-*.safetensors"], live)
    assert set(found.names) == set(live)


def test_what_cannot_be_combined_is_named(folders: Path) -> None:
    with pytest.raises(UserError, match="nothing at nowhere"):
        paths_of(["nowhere"])
    with pytest.raises(UserError, match="do not tell the optimizer step"):
        steps_of([Path("run/one.safetensors"), Path("run/two.safetensors")])
    with pytest.raises(UserError, match=r"holds 'down\.bias', which is no weight of the module"):
        FileTrajectory.open([f"{folders}/checkpoint-*/unet"], {"other.weight": torch.zeros(2)})
    with pytest.raises(UserError, match=r"holds 'norm\.running_mean', which is no weight of the module"):
        FileTrajectory.open([f"{folders}/checkpoint-*/unet"], LIVE)
    empty = folders / "checkpoint-200" / "unet"
    empty.mkdir(parents=True)
    with pytest.raises(UserError, match=r"checkpoint-200/unet holds no safetensors file"):
        opened(folders)
    save_file({**MEMBERS.tensors[0], "down.bias": torch.zeros(3)}, empty / "model.safetensors")
    with pytest.raises(UserError, match=r"checkpoint-200/unet is of another network .* 'network.down.bias'"):
        opened(folders)
    (empty / "model.safetensors").write_bytes(b"no such thing")
    with pytest.raises(io.CorruptFileError, match="is truncated or no safetensors file"):
        opened(folders)
    found = opened(folders, skip_damaged=True)
    assert len(found.members) == 3 and "checkpoint-200" in found.damaged[0]
