"""Pairs: each is what the teacher makes of its noise, by any number of processes, with any interruption."""

import dataclasses
from pathlib import Path

import pytest
import torch
from modules.tiny_tokens import CLASSES, CODE_DIM, CODES, tiny_teacher

from genlight import io
from genlight.diffusion.flow_codes import transport
from genlight.errors import UserError
from genlight.io import primitives
from genlight.modules import dd_pairs
from genlight.modules.dd_pairs import PairSettings, folder_of, make_pairs, pair_noise, pairs_record, read_pairs
from genlight.modules.token_folder import TokenTeacher
from genlight.nets.autoregressive import parallel_probabilities

SETTINGS = PairSettings(num_pairs=50, seed=3, shard_size=8)


@pytest.fixture(scope="module", params=["llamagen", "var"])
def teacher(request: pytest.FixtureRequest) -> TokenTeacher:
    return tiny_teacher(str(request.param), guidance_scale=1.5)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_tokens_are_a_fixed_point_of_the_flow(teacher: TokenTeacher, tmp_path: Path) -> None:
    """Given the tokens before it, each token is where its own noise is carried: one pass of the network shows all."""
    assert make_pairs(tmp_path, teacher, SETTINGS) == 7
    pairs = read_pairs(tmp_path, teacher, SETTINGS)
    batch = pairs.__getitems__(range(50))
    length = teacher.noise_shape[0]
    assert batch["noise"].shape == (50, length, CODE_DIM) and batch["tokens"].shape == (50, length)
    assert torch.equal(batch["label"], torch.arange(50) % CLASSES)
    chances = parallel_probabilities(teacher.model, batch["tokens"], batch["label"], teacher.settings)
    found = transport(batch["noise"].flatten(0, 1), chances.flatten(0, 1).log(), teacher.model.codebook)[1]
    assert float((found.view(50, length) == batch["tokens"]).float().mean()) >= 0.99
    assert len(batch["tokens"].unique()) > CODES / 2
    # any batch of them is a part of the whole
    some = pairs.__getitems__([41, 2, 30])
    assert all(torch.equal(some[key], batch[key][[41, 2, 30]]) for key in batch)


def test_noise_that_is_drawn_for_each_batch_is_that_which_is_kept(
    teacher: TokenTeacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_pairs(tmp_path, teacher, SETTINGS)
    kept, drawn = (read_pairs(tmp_path, teacher, SETTINGS) for _ in range(2))
    assert kept.kept_noise is not None
    monkeypatch.setattr(dd_pairs, "KEPT_NUMBERS", 0)
    assert drawn.kept_noise is None
    assert torch.equal(kept.__getitems__([41, 2, 30])["noise"], drawn.__getitems__([41, 2, 30])["noise"])


def test_noise_is_normal_and_belongs_to_seed_and_index() -> None:
    noise = pair_noise(0, range(300), (40, 4))
    assert noise.dtype == torch.float32 and abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    assert torch.equal(pair_noise(0, [7, 100], (40, 4)), noise[[7, 100]])
    assert not torch.equal(pair_noise(1, [7], (40, 4)), noise[[7]])
    assert len(noise.flatten().unique()) > 47000


@pytest.mark.parametrize("world_size", [2, 3])
def test_any_number_of_processes_makes_the_same_bytes(teacher: TokenTeacher, world_size: int, tmp_path: Path) -> None:
    make_pairs(tmp_path / "one", teacher, SETTINGS)
    made = [make_pairs(tmp_path / "all", teacher, SETTINGS, rank=r, world_size=world_size) for r in range(world_size)]
    assert sum(made) == 7 and max(made) - min(made) <= 1
    assert contents(tmp_path / "all") == contents(tmp_path / "one")


class Killed(BaseException):
    """What no handler of errors catches."""


def test_a_killed_making_goes_on_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped before each of the first calls that change the disk, then continued by two processes."""
    teacher = tiny_teacher()
    make_pairs(tmp_path / "whole", teacher, SETTINGS)
    for stop in (0, 1, 2, 3, 5, 8, 9, 13):
        folder, calls = tmp_path / f"stopped-{stop}", []

        def counted(name: str, path: Path, calls: list[str] = calls, stop: int = stop) -> None:
            calls.append(name)
            if len(calls) > stop:
                raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(primitives, "before_primitive", counted)
            with pytest.raises(Killed):
                make_pairs(folder, teacher, SETTINGS)
        for rank in range(2):
            make_pairs(folder, teacher, SETTINGS, rank=rank, world_size=2)
        found = {name: data for name, data in contents(folder).items() if not name.startswith(".")}
        assert found == contents(tmp_path / "whole"), stop


def test_a_damaged_shard_is_made_again_and_whole_ones_are_not(tmp_path: Path) -> None:
    teacher = tiny_teacher()
    make_pairs(tmp_path, teacher, SETTINGS)
    whole = contents(tmp_path)
    path = tmp_path / "shard-00004.safetensors"
    path.write_bytes(whole[path.name][:-4])
    with pytest.raises(UserError, match="truncated or altered"):
        read_pairs(tmp_path, teacher, SETTINGS)
    assert make_pairs(tmp_path, teacher, SETTINGS) == 1
    assert contents(tmp_path) == whole
    path.unlink()
    with pytest.raises(UserError, match="lacks shard 4 of 7"):
        read_pairs(tmp_path, teacher, SETTINGS)


def test_where_more_are_asked_for_only_the_new_ones_are_made(teacher: TokenTeacher, tmp_path: Path) -> None:
    """Those of the shard that was not full among them; by two processes, to the bytes of one that makes all at once."""
    more = dataclasses.replace(SETTINGS, num_pairs=70)
    assert folder_of("cache", teacher, more) == folder_of("cache", teacher, SETTINGS)
    make_pairs(tmp_path / "grown", teacher, SETTINGS)
    before = contents(tmp_path / "grown")
    assert [make_pairs(tmp_path / "grown", teacher, more, rank=rank, world_size=2) for rank in range(2)] == [2, 1]
    assert make_pairs(tmp_path / "new", teacher, more) == 9
    after = contents(tmp_path / "grown")
    assert after == before | contents(tmp_path / "new")
    whole = read_pairs(tmp_path / "grown", teacher, more)
    assert len(whole) == 70 and torch.equal(whole.tokens, read_pairs(tmp_path / "new", teacher, more).tokens)
    # whoever wants the first ones still has them
    assert make_pairs(tmp_path / "grown", teacher, SETTINGS) == 0
    assert torch.equal(read_pairs(tmp_path / "grown", teacher, SETTINGS).tokens[:48], whole.tokens[:48])


def test_pairs_of_another_teacher_are_refused(tmp_path: Path) -> None:
    teacher = tiny_teacher()
    with pytest.raises(UserError, match="holds no pairs"):
        read_pairs(tmp_path, teacher, SETTINGS)
    make_pairs(tmp_path, teacher, SETTINGS)
    for other, settings, key in (
        (tiny_teacher(top_k=3), SETTINGS, "teacher"),
        (teacher, dataclasses.replace(SETTINGS, steps=16), "steps"),
        (teacher, dataclasses.replace(SETTINGS, seed=4), "seed"),
    ):
        for use in (read_pairs, make_pairs):
            with pytest.raises(UserError, match=f"other pairs: {key} is"):
                use(tmp_path, other, settings)
        assert folder_of("cache", other, settings) != folder_of("cache", teacher, SETTINGS)
    assert io.read_json(tmp_path / "index.json") == pairs_record(teacher, SETTINGS)


def test_how_exact_the_flow_is_stands_beside_the_pairs(teacher: TokenTeacher, tmp_path: Path) -> None:
    """One step takes the likeliest code whatever the noise."""
    settings = dataclasses.replace(SETTINGS, num_pairs=600, shard_size=600, guidance_range=(1.0, 3.0))
    make_pairs(tmp_path / "fine", teacher, settings)
    checked = 6 * teacher.noise_shape[0]
    found = io.read_json(tmp_path / "fine" / "accuracy.json")
    assert found == {"checked": checked, "flipped": found["flipped"], "steps": 64, "method": "heun"}
    assert found["flipped"] <= 1
    with pytest.warns(UserWarning, match=rf"of {checked} tokens are others by 64 steps of Heun's method"):
        make_pairs(tmp_path / "rough", teacher, dataclasses.replace(settings, steps=1))


def test_logits_that_are_not_finite_stop_the_making(tmp_path: Path) -> None:
    teacher = tiny_teacher()
    with torch.no_grad():
        teacher.model.transformer.head.weight[0] = torch.nan
    with pytest.raises(ValueError, match="logits of group 0"):
        make_pairs(tmp_path, teacher, SETTINGS)


@pytest.mark.parametrize("key", ["num_pairs", "shard_size", "steps"])
def test_numbers_below_one_are_named(key: str) -> None:
    with pytest.raises(ValueError, match=f"{key} = 0"):
        dataclasses.replace(SETTINGS, **{key: 0})
    with pytest.raises(ValueError, match="seed = -1"):
        dataclasses.replace(SETTINGS, seed=-1)


def test_each_pair_has_a_guidance_scale_of_its_own(teacher: TokenTeacher, tmp_path: Path) -> None:
    """It is kept with the pair, and the tokens are what the teacher says at this scale."""
    settings = dataclasses.replace(SETTINGS, guidance_range=(1.0, 3.0))
    for rank in range(2):
        make_pairs(tmp_path / "two", teacher, settings, rank=rank, world_size=2)
    make_pairs(tmp_path / "one", teacher, settings)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    batch = read_pairs(tmp_path / "one", teacher, settings).__getitems__(range(50))
    scales = batch["guidance"]
    assert scales.shape == (50,) and scales.dtype == torch.float32
    assert scales.min() >= 1 and scales.max() <= 3 and scales.std() > 0.4 and len(scales.unique()) == 50
    length, equal = teacher.noise_shape[0], 0
    for row in range(50):
        tokens, label = batch["tokens"][row : row + 1], batch["label"][row : row + 1]
        own = dataclasses.replace(teacher.settings, guidance_scale=float(scales[row]))
        chances = parallel_probabilities(teacher.model, tokens, label, own)
        equal += int((transport(batch["noise"][row], chances[0].log(), teacher.model.codebook)[1] == tokens[0]).sum())
    assert equal >= 0.99 * 50 * length
    # at one scale for all many of them would be others
    make_pairs(tmp_path / "plain", teacher, SETTINGS)
    plain = read_pairs(tmp_path / "plain", teacher, SETTINGS).__getitems__(range(50))
    assert "guidance" not in plain and torch.equal(plain["noise"], batch["noise"])
    assert not torch.equal(plain["tokens"], batch["tokens"])


def test_a_range_of_one_scale_is_the_teacher_at_that_scale(teacher: TokenTeacher, tmp_path: Path) -> None:
    """Else equal in all that a student is given."""
    fixed = dataclasses.replace(SETTINGS, guidance_range=(1.5, 1.5))
    assert teacher.settings.guidance_scale == 1.5
    make_pairs(tmp_path / "fixed", teacher, fixed)
    make_pairs(tmp_path / "plain", teacher, SETTINGS)
    found = read_pairs(tmp_path / "fixed", teacher, fixed).__getitems__(range(50))
    plain = read_pairs(tmp_path / "plain", teacher, SETTINGS).__getitems__(range(50))
    assert found.pop("guidance").eq(1.5).all()
    assert found.keys() == plain.keys() and all(torch.equal(found[key], plain[key]) for key in plain)
    for folder, settings in (("fixed", SETTINGS), ("plain", fixed)):
        with pytest.raises(UserError, match="other pairs: guidance_range is"):
            read_pairs(tmp_path / folder, teacher, settings)
    for wrong in ((0.5, 2.0), (3.0, 2.0), (2.0,)):
        with pytest.raises(ValueError, match="guidance_range = "):
            dataclasses.replace(SETTINGS, guidance_range=wrong)
