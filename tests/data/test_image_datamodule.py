from types import SimpleNamespace

import pytest
from lightning.pytorch.trainer.states import TrainerFn

from genlight.data.digits import DigitsDataModule
from genlight.data.image_datamodule import ImageDataModule
from genlight.errors import UserError


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 0}, "data.image_size=0 must be at least 1"),
        ({"channels": 2}, r"data.channels=2 must be 1 \(grey\) or 3 \(colour\)"),
        ({"num_classes": 0}, "data.num_classes=0 must be at least 1"),
        ({"batch_size": 0}, "data.batch_size=0 must be at least 1"),
        ({"eval_batch_size": -1}, "data.eval_batch_size=-1 must be at least 1"),
        ({"num_samples": 0}, "data.num_samples=0 must be at least 1"),
        ({"num_workers": -1}, "data.num_workers=-1 and data.seed=5 must not be negative"),
        ({"seed": -3}, "data.num_workers=0 and data.seed=-3 must not be negative"),
        ({"noise_shape": (4, 0, 2)}, r"data.noise_shape\[1\]=0 must be at least 1"),
        ({"draw": "final"}, "data.draw='final' is not one of search, select, report"),
        ({"evaluation": "fid"}, 'data.evaluation=\'fid\' must be "generation" or "classification"'),
        ({"evaluation": "classification"}, "data.evaluation=classification needs data.num_classes"),
    ],
)
def test_a_value_out_of_range_names_its_key(settings, changes, message):
    with pytest.raises(ValueError, match=rf"^{message}$"):
        ImageDataModule(**{**settings, **changes})


def test_a_constructor_touches_nothing(settings, monkeypatch):
    monkeypatch.setattr(ImageDataModule, "load_images", None)
    monkeypatch.setattr(ImageDataModule, "content", None)
    ImageDataModule(**settings)


def test_classification_validates_on_all_held_out_images(settings):
    changes = {"channels": 1, "num_classes": 10, "evaluation": "classification", "eval_batch_size": 100}
    data = DigitsDataModule(**{**settings, **changes})
    batches = list(data.val_dataloader())
    assert sum(len(batch["label"]) for batch in batches) == 899
    assert batches[0].keys() == {"image", "label"}


def test_fewer_images_than_a_batch_is_one_clear_line(settings):
    data = DigitsDataModule(**{**settings, "channels": 1, "batch_size": 500})
    data.trainer = SimpleNamespace(global_rank=0, world_size=2)
    message = r"^digits: data.batch_size=500 on 2 device\(s\) needs at least 1000 training images, there are 898$"
    with pytest.raises(UserError, match=message):
        data.train_dataloader()


def test_an_unknown_split_is_refused(settings):
    with pytest.raises(ValueError, match=r"digits has no split 'val', it has train, test"):
        DigitsDataModule(**settings).reference_loader("val")


def test_only_the_split_that_is_needed_is_loaded_and_once(settings, monkeypatch):
    loaded = []
    original = DigitsDataModule.load_images
    monkeypatch.setattr(DigitsDataModule, "load_images", lambda self, s: loaded.append(s) or original(self, s))
    data = DigitsDataModule(**settings)
    data.trainer = SimpleNamespace(state=SimpleNamespace(fn=TrainerFn.VALIDATING))
    data.prepare_data()
    data.setup("validate")
    assert loaded == ["test"]
    data.trainer.state.fn = TrainerFn.FITTING
    data.prepare_data()
    data.setup("fit")
    data.reference_loader("test")
    assert loaded == ["test", "train"]


def test_another_data_set_may_be_measured_with_a_checkpoint(settings):
    data = DigitsDataModule(**settings)
    saved = {"fingerprint": "0" * 64, "order": {}}
    data.trainer = SimpleNamespace(state=SimpleNamespace(fn=TrainerFn.VALIDATING), global_rank=0, world_size=1)
    data.load_state_dict(saved)
    data.trainer.state.fn = TrainerFn.FITTING
    with pytest.raises(UserError, match=r"fingerprint 000000000000, digits as configured has [0-9a-f]{12}"):
        data.load_state_dict(saved)
