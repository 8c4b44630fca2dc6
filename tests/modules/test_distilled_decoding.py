"""The module that distils a teacher: losses, samples, what it refuses, and the folder that needs torch alone."""

import copy
import subprocess
import sys
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from modules.tiny_token_teacher import CLASSES, CODES, DIM, saved_teacher, tiny_captions, tiny_teacher
from nets.test_teachers import randomised
from torch.nn import functional

from genlight.data.digits import DigitsDataModule
from genlight.data.pairs import PairsDataModule
from genlight.diffusion.flow_codes import flow_choice
from genlight.errors import UserError
from genlight.io import read_json
from genlight.modules.distilled_decoding import DistilledDecodingModule
from genlight.modules.exported_student import read_tensors
from genlight.modules.token_folder import save_token_teacher
from genlight.nets.autoregressive import decode
from genlight.nets.published import published_sources

KINDS = ("llamagen", "var", "var-shared")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("teachers")
    return {kind: str(saved_teacher(root / kind, kind)) for kind in KINDS}


def module_of(folder: str, trained: bool = True, **options) -> DistilledDecodingModule:
    """A student; with `trained` one whose weights all matter."""
    torch.manual_seed(0)
    module = DistilledDecodingModule(folder, **options)
    if trained:
        randomised(module.student)
    return module


def pairs(module: DistilledDecodingModule, count: int) -> dict[str, torch.Tensor]:
    teacher = module.teacher
    noise = torch.randn(count, *module.sample_shape, generator=torch.Generator().manual_seed(1))
    label = torch.arange(count) % CLASSES
    choose = flow_choice(noise, teacher.model.codebook, teacher.model.group_sizes)
    return {"noise": noise, "tokens": decode(teacher.model, label, teacher.settings, choose), "label": label}


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_asks_for_what_is_not_decided_yet(kind: str, folders: dict[str, str]) -> None:
    """Against sums over samples and places, for the timesteps that the seed draws."""
    module = module_of(folders[kind], timesteps=(0, 1, 2))
    batch = pairs(module, 6)
    torch.manual_seed(3)
    found = module.losses(**batch)
    torch.manual_seed(3)
    steps = torch.randint(3, (6,)).tolist()
    assert len(set(steps)) > 1
    sizes, codebook = module.student.group_sizes, module.teacher.model.codebook
    entropies, squares, right = [], [], []
    for row, step in enumerate(steps):
        done = sum(sizes[:step])
        noise, tokens, label = (batch[key][row : row + 1] for key in ("noise", "tokens", "label"))
        x = torch.cat((codebook[tokens[:, :done]], noise[:, done:]), 1)
        flags = torch.tensor([[place < done for place in range(sum(sizes))]])
        logits, vectors = module.student(x, flags, label)
        for place in range(done, sum(sizes)):
            entropies.append(-logits[0, place].log_softmax(-1)[tokens[0, place]])
            squares.append((vectors[0, place] - codebook[tokens[0, place]]).square().mean())
            right.append(float(logits[0, place].argmax() == tokens[0, place]))
    torch.testing.assert_close(found["cross_entropy"], torch.stack(entropies).mean())
    torch.testing.assert_close(found["embedding"], torch.stack(squares).mean())
    assert float(found["agreement"]) == pytest.approx(sum(right) / len(right))


@pytest.mark.parametrize("kind", ["llamagen", "var"])
def test_a_student_learns_its_pairs(kind: str, folders: dict[str, str]) -> None:
    module = module_of(folders[kind], trained=False, timesteps=(0, 1))
    batch = pairs(module, 64)

    def right() -> float:
        found = module.decode_noise(batch["noise"], batch["label"]).tokens
        return float((found == batch["tokens"]).double().mean())

    before = right()
    optimizer = torch.optim.AdamW(module.parameters(), lr=5e-3)
    module.train()
    for _ in range(200):
        optimizer.zero_grad()
        losses = module.losses(**batch)
        (losses["cross_entropy"] + 0.5 * losses["embedding"]).backward()
        optimizer.step()
    assert right() > max(0.5, before + 0.2)
    # neither the teacher nor the codebook has moved
    assert not any("teacher" in name or "tokenizer" in name for name, _ in module.named_parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_samples_do_not_depend_on_the_batch_and_are_images_of_the_tokens(kind: str, folders: dict[str, str]) -> None:
    module = module_of(folders[kind], timesteps=(0, 2), num_inference_steps=2)
    batch = pairs(module, 5)
    images = module.sample(batch["noise"], batch["label"])
    assert images.shape == (5, *module.image_shape) and images.abs().max() <= 1
    one = torch.cat([module.sample(batch["noise"][i : i + 1], batch["label"][i : i + 1]) for i in range(5)])
    torch.testing.assert_close(images, one, atol=1e-4, rtol=1e-4)
    decoded = module.decode_noise(batch["noise"], batch["label"], timesteps=(0, 2))
    torch.testing.assert_close(images, module.teacher.tokenizer.decode(decoded.tokens))
    # one step is another sample, and tokens before the second step are the same
    first = module.decode_noise(batch["noise"], batch["label"], timesteps=(0,))
    done = sum(module.student.group_sizes[:2])
    assert torch.equal(first.tokens[:, :done], decoded.tokens[:, :done])
    assert not torch.equal(first.tokens, decoded.tokens)


def test_wrong_arguments_are_named(folders: dict[str, str], tmp_path: Path) -> None:
    for options, message in (
        ({"timesteps": [1]}, "module.timesteps = .1. must increase from 0"),
        ({"timesteps": [0, 3, 3]}, "must increase from 0"),
        ({"timesteps": []}, "module.timesteps"),
        ({"num_inference_steps": 2}, "module.num_inference_steps = 2"),
        ({"embedding_weight": -1.0}, "module.embedding_weight"),
    ):
        with pytest.raises(ValueError, match=message):
            DistilledDecodingModule(folders["llamagen"], **options)
    with pytest.raises(UserError, match="decides 16 groups"):
        DistilledDecodingModule(folders["llamagen"], timesteps=[0, 16]).configure_model()
    with pytest.raises(UserError, match=r"module\.split_timestep = 4 must be from 0 to 3"):
        DistilledDecodingModule(folders["var"], split_timestep=4).configure_model()
    with pytest.raises(UserError):
        DistilledDecodingModule(str(tmp_path / "nothing")).configure_model()
    module = module_of(folders["llamagen"])
    noise, label = torch.randn(2, *module.sample_shape), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="needs labels"):
        module.sample(noise)
    for wrong in (CLASSES, -1):
        # the class that stands for none is not one that a student knows
        with pytest.raises(ValueError, match="from 0 to 9"):
            module.sample(noise, torch.tensor([0, wrong]))
    with pytest.raises(ValueError, match="knows no texts"):
        module.sample(noise, torch.randn(2, 5, 6))
    with pytest.raises(ValueError, match=r"has learned 1\.5"):
        module.sample(noise, label, guidance_scale=3.0)
    assert torch.equal(module.sample(noise, label, guidance_scale=1.5), module.sample(noise, label))


def test_a_checkpoint_of_another_student_is_refused(folders: dict[str, str]) -> None:
    one, other = module_of(folders["llamagen"]), module_of(folders["var"])
    checkpoint: dict = {}
    one.on_save_checkpoint(checkpoint)
    one.on_load_checkpoint(checkpoint)
    with pytest.raises(UserError, match="of another model"):
        other.on_load_checkpoint(checkpoint)
    with pytest.raises(UserError, match="of another architecture"):
        other.load_state_dict(one.state_dict())
    fresh = DistilledDecodingModule(folders["llamagen"])
    fresh.load_state_dict(one.state_dict())
    assert fresh.fingerprint() == one.fingerprint()


def test_a_student_goes_on_from_nothing_that_it_has_not_learned(folders: dict[str, str]) -> None:
    """From fewer it does, and a checkpoint that does not say what it has learned is taken."""
    checkpoint: dict = {}
    one = module_of(folders["llamagen"], timesteps=(0, 5, 7))
    one.on_save_checkpoint(checkpoint)
    module_of(folders["llamagen"], timesteps=(0, 7)).on_load_checkpoint(checkpoint)
    other = module_of(folders["llamagen"], timesteps=(0, 6))
    message = r"module\.timesteps = \[0, 6\], but the checkpoint has learned \[0, 5, 7\]"
    with pytest.raises(UserError, match=message):
        other.on_load_checkpoint(checkpoint)
    other.on_load_checkpoint({"genlight_module": checkpoint["genlight_module"]})
    noise, label = torch.randn(2, *one.sample_shape), torch.tensor([0, 1])
    assert one.sample(noise, label, timesteps=(0, 7)).shape == (2, *one.image_shape)
    with pytest.raises(ValueError, match=r"timesteps = \[0, 6\]: the student has learned \[0, 5, 7\]"):
        one.sample(noise, label, timesteps=(0, 6))


def test_a_file_is_read_into_the_memory_of_its_tensors(tmp_path: Path) -> None:
    """Of all types; nothing besides is held, and a file that ends too early is not taken."""
    path, kinds = tmp_path / "it.safetensors", (torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.uint8)
    given = {str(kind): torch.randint(0, 100, (300, 1000)).to(kind) for kind in (*kinds, torch.float64)}
    safetensors.torch.save_file({**given, "one": torch.tensor(0.5)}, path, metadata={"kind": "test"})
    tracemalloc.start()
    found = read_tensors(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.pop("one") == 0.5 and found.keys() == given.keys()
    assert all(found[key].dtype == given[key].dtype and torch.equal(found[key], given[key]) for key in given)
    assert peak < 1.05 * path.stat().st_size
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"it\.safetensors is truncated"):
        read_tensors(path)


def test_a_misspelt_teacher_is_no_reason_to_train_one(
    folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("genlight.recipes.run_command", None)
    folder = saved_teacher(tmp_path / "dd" / "teacher" / "fit" / "artifact")
    DistilledDecodingModule(str(folder), teacher_recipe="dd/teacher").prepare(tmp_path, tmp_path)
    wrong = str(folder).replace("teacher", "techer")
    with pytest.raises(UserError, match=rf"module\.teacher = {wrong} is not there, and is not what .* makes"):
        DistilledDecodingModule(wrong, teacher_recipe="dd/teacher").prepare(tmp_path, tmp_path)


def test_a_copy_shares_the_teacher(folders: dict[str, str]) -> None:
    module = module_of(folders["llamagen"])
    assert copy.deepcopy(module).teacher.model.transformer is module.teacher.model.transformer


def test_training_moves_the_tokenizer_and_not_the_teachers_network(folders: dict[str, str]) -> None:
    """To a device without memory, which is one here."""
    module = module_of(folders["var"]).to("meta")
    teacher = module.teacher
    assert teacher.model.codebook.is_meta and not teacher.model.transformer.head.weight.is_meta
    assert module.active_teacher.model.transformer.head.weight.is_meta


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "64-true"])
def test_other_numbers_than_those_that_made_the_pairs_are_refused(precision: str, folders: dict[str, str]) -> None:
    module = module_of(folders["llamagen"])
    module.trainer = SimpleNamespace(precision=precision)  # type: ignore[assignment]
    with pytest.raises(UserError, match=rf"trainer\.precision = {precision}"):
        module.setup("fit")


def test_a_released_student_begins_with_its_weights(folders: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "student.safetensors"
    sources = published_sources(module_of(folders["var"]).student)
    weights = {source.key: torch.randn(source.shape) for source in sources.values()}
    safetensors.torch.save_file(weights, path)
    module = DistilledDecodingModule(folders["var"], student_weights=str(path))
    found = module.student.state_dict()
    for name, source in sources.items():
        assert torch.equal(found[name], weights[source.key])
    with pytest.raises(UserError, match="does not fit RasterStudent"):
        DistilledDecodingModule(folders["llamagen"], student_weights=str(path)).configure_model()


ALONE = """
import sys
sys.modules["genlight"] = sys.modules["diffusers"] = sys.modules["safetensors"] = None
sys.path.insert(0, sys.argv[1])
import torch
from sample import Student, read_tensors
given = read_tensors(sys.argv[2])
student = Student(sys.argv[1])
label = given["label"].long()
expected = given["images"], given["two"]
found = student.sample(given["noise"], label), student.sample(given["noise"], label, [0, 2])
for a, b in zip(found, expected):
    assert a.shape == b.shape and (a - b).abs().max() < 1e-4, (a - b).abs().max()
assert student.noise(3, seed=0).shape == (3, *given["noise"].shape[1:])
for wrong in ([1], [0, 0], [0, 99], [0, 1], []):
    try:
        student.sample(given["noise"], label, wrong)
    except ValueError:
        continue
    raise SystemExit(f"{wrong} was taken")
print("equal")
"""


@pytest.mark.parametrize("kind", KINDS)
def test_the_folder_samples_where_only_torch_is(kind: str, folders: dict[str, str], tmp_path: Path) -> None:
    """With vectors of the last groups, in one step and in two."""
    split = 2 if kind != "llamagen" else 11
    module = module_of(folders[kind], timesteps=(0, 2), split_timestep=split)
    batch = pairs(module, 4)
    images = module.sample(batch["noise"], batch["label"])
    plain = module.sample(batch["noise"], batch["label"], split_timestep=len(module.student.group_sizes))
    assert not torch.equal(images, plain)
    two = module.sample(batch["noise"], batch["label"], timesteps=(0, 2))
    module.save_pretrained(tmp_path / "student")
    given = {"noise": batch["noise"], "label": batch["label"].float(), "images": images, "two": two}
    safetensors.torch.save_file(given, tmp_path / "given.safetensors")
    words = [sys.executable, "-c", ALONE, str(tmp_path / "student"), str(tmp_path / "given.safetensors")]
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.stdout.strip() == "equal", done.stderr
    config = read_json(tmp_path / "student" / "config.json")
    assert config["timesteps"] == [0] and config["guidance_scale"] == 1.5 and config["image_shape"] == [1, 8, 8]
    saved = safetensors.torch.load_file(tmp_path / "student" / "student.safetensors")
    assert torch.equal(saved["codebook"], module.teacher.model.codebook) and saved["codebook"].shape == (CODES, DIM)


def test_an_image_distance_is_asked_for_only_with_a_weight(
    folders: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from genlight.modules import distilled_decoding

    calls = []

    def stand_in(name: str):
        calls.append(name)
        return lambda made, wanted: (made - wanted).square().flatten(1).mean(1)

    monkeypatch.setattr(distilled_decoding, "distance", stand_in)
    plain, weighted = (module_of(folders["llamagen"], perceptual_weight=weight) for weight in (0.0, 1.0))
    for module in (plain, weighted):
        module.on_fit_start()
    assert calls == ["lpips"]
    batch = pairs(plain, 3)
    assert "perceptual" not in plain.losses(**batch)
    found = weighted.losses(**batch)["perceptual"]
    _, vectors = weighted.student(batch["noise"], torch.zeros_like(batch["tokens"], dtype=torch.bool), batch["label"])
    decoder = weighted.teacher.tokenizer
    codes = functional.embedding(batch["tokens"], decoder.quantizer.codebook)
    expected = (decoder.decode_vectors(vectors) - decoder.decode_vectors(codes)).square().mean()
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", ["llamagen", "var"])
def test_a_guidance_scale_is_chosen_in_sampling(kind: str, folders: dict[str, str], tmp_path: Path) -> None:
    """One pass whatever the scale, the teacher's where none is asked for, and the folder knows it too."""
    module = module_of(folders[kind], timesteps=(0, 2), guidance_range=(1, 3))
    batch = pairs(module, 4)
    noise, label = batch["noise"], batch["label"]
    calls: list[int] = []
    module.student.register_forward_hook(lambda *found: calls.append(1))
    made = {scale: module.sample(noise, label, guidance_scale=scale) for scale in (1.0, 1.5, 3.0)}
    assert len(calls) == 3
    assert not torch.equal(made[1.0], made[1.5]) and not torch.equal(made[1.5], made[3.0])
    assert torch.equal(module.sample(noise, label), made[1.5]) and module.settings.guidance_scale == 1.5
    for wrong in (0.5, 3.1):
        with pytest.raises(ValueError, match=rf"guidance_scale = {wrong} must be from 1\.0 to 3\.0"):
            module.sample(noise, label, guidance_scale=wrong)
    other = module_of(folders[kind], timesteps=(0, 2), guidance_range=(1, 3), guidance_scale=3.0)
    assert torch.equal(other.sample(noise, label), made[3.0]) and other.settings.guidance_scale == 3.0
    other.save_pretrained(tmp_path / "student")
    given = {"noise": noise, "label": label.float(), "images": made[3.0]}
    given["two"] = other.sample(noise, label, timesteps=(0, 2))
    given["low"] = other.sample(noise, label, guidance_scale=1.25)
    safetensors.torch.save_file(given, tmp_path / "given.safetensors")
    program = ALONE.replace(
        'print("equal")',
        """
found = student.sample(given["noise"], label, guidance_scale=1.25)
assert (found - given["low"]).abs().max() < 1e-4
try:
    student.sample(given["noise"], label, guidance_scale=3.5)
except ValueError as error:
    assert "from 1.0 to 3.0" in str(error)
    print("equal")
""",
    )
    words = [sys.executable, "-c", program, str(tmp_path / "student"), str(tmp_path / "given.safetensors")]
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.stdout.strip() == "equal", done.stderr


def test_the_scales_of_pairs_are_what_the_student_is_told(folders: dict[str, str]) -> None:
    module = module_of(folders["llamagen"], guidance_range=(1, 3))
    batch = pairs(module, 6) | {"guidance": torch.linspace(1, 3, 6)}
    found = module.losses(**batch)
    flags = torch.zeros_like(batch["tokens"], dtype=torch.bool)
    logits, _ = module.student(batch["noise"], flags, batch["label"], batch["guidance"])
    expected = functional.cross_entropy(logits.flatten(0, 1), batch["tokens"].flatten())
    torch.testing.assert_close(found["cross_entropy"], expected)
    with pytest.raises(UserError, match="of another model"):
        checkpoint: dict = {}
        module.on_save_checkpoint(checkpoint)
        module_of(folders["llamagen"]).on_load_checkpoint(checkpoint)


def test_guidance_that_does_not_fit_is_named(folders: dict[str, str]) -> None:
    folder = folders["llamagen"]
    with pytest.raises(UserError, match=r"module: guidance_range = \[3.0, 1.0\]"):
        DistilledDecodingModule(folder, guidance_range=(3, 1))
    with pytest.raises(ValueError, match=r"module\.guidance_scale = 2.0 needs module\.guidance_range"):
        DistilledDecodingModule(folder, guidance_scale=2.0)
    # the teacher's own scale is 1.5
    with pytest.raises(UserError, match=r"module: guidance_scale = 1\.5 must be from 2\.0 to 3\.0"):
        DistilledDecodingModule(folder, guidance_range=(2, 3)).configure_model()
    images = DigitsDataModule(
        image_size=8, channels=1, num_classes=10, batch_size=4, eval_batch_size=8, num_samples=8, seed=0
    )
    data = PairsDataModule(images, folder, num_pairs=10, batch_size=4, seed=0, guidance_range=[1, 3])
    module_of(folder, guidance_range=(1, 3)).check_data(data)
    for guidance_range, shown in ((None, "null"), ((1, 4), r"\[1.0, 4.0\]")):
        message = rf"data\.guidance_range = \[1.0, 3.0\], but module\.guidance_range = {shown}"
        with pytest.raises(UserError, match=message):
            module_of(folder, guidance_range=guidance_range).check_data(data)


def test_pairs_of_another_teacher_are_refused(folders: dict[str, str], tmp_path: Path) -> None:
    teacher = tiny_teacher("llamagen")
    with torch.no_grad():
        next(teacher.model.transformer.parameters()).add_(1)
    save_token_teacher(tmp_path / "other", teacher)
    images = DigitsDataModule(
        image_size=8, channels=1, num_classes=10, batch_size=4, eval_batch_size=8, num_samples=8, seed=0
    )
    same, other = (
        PairsDataModule(images, folder, num_pairs=10, batch_size=4, seed=0)
        for folder in (folders["llamagen"], str(tmp_path / "other"))
    )
    module_of(folders["llamagen"]).check_data(same)
    with pytest.raises(UserError, match=r"data\.teacher and module\.teacher are different networks"):
        module_of(folders["llamagen"]).check_data(other)


def test_a_teacher_of_texts_is_distilled(tmp_path: Path) -> None:
    """Captions by number through pairs and training; the student then takes any text, in its folder too."""
    folder = str(saved_teacher(tmp_path / "teacher", "captioned"))
    images = DigitsDataModule(
        image_size=8, channels=1, num_classes=10, batch_size=4, eval_batch_size=8, num_samples=8, seed=0
    )
    data = PairsDataModule(
        images,
        folder,
        num_pairs=12,
        batch_size=6,
        seed=1,
        shard_size=12,
        cache=str(tmp_path / "c"),
        guidance_range=[1, 3],
    )
    module = module_of(folder, timesteps=(0, 2), guidance_range=(1, 3))
    module.check_data(data)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    texts = tiny_captions()[batch["label"]]
    torch.manual_seed(0)
    found = module.losses(**batch)
    assert all(torch.isfinite(value) for value in found.values()) and len(batch["label"].unique()) > 2
    noise, label = batch["noise"], batch["label"]
    made = module.sample(noise, label)
    assert torch.equal(made, module.sample(noise, texts)) and not torch.equal(made, module.sample(noise, texts.flip(0)))
    with pytest.raises(ValueError, match="from 0 to 9"):
        module.sample(noise, label + 10)
    module.save_pretrained(tmp_path / "student")
    given = {"noise": noise, "label": texts, "images": made, "two": module.sample(noise, label, timesteps=(0, 2))}
    safetensors.torch.save_file(given, tmp_path / "given.safetensors")
    program = ALONE.replace('given["label"].long()', 'given["label"]')
    words = [sys.executable, "-c", program, str(tmp_path / "student"), str(tmp_path / "given.safetensors")]
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.stdout.strip() == "equal", done.stderr
