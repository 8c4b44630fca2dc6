from types import SimpleNamespace

import pytest

from genlight.errors import UserError


def _data(shape=(1, 8, 8), num_classes=3):
    return SimpleNamespace(image_shape=shape, num_classes=num_classes, class_names=("a", "b", "c"))


def test_fitting_data_passes_and_leaves_the_class_names(tiny):
    module = tiny.module("vp", class_conditional=True, num_classes=3)
    module.check_data(_data())
    assert module.class_names == ["a", "b", "c"]
    tiny.module("vp").check_data(_data(num_classes=None))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (_data((3, 8, 8)), r"data\.channels = 3, but module\.network\.in_channels = 1"),
        (_data((1, 16, 16)), r"data\.image_size = 16, but module\.network\.sample_size = 8"),
        (_data((1, 8, 4)), r"data\.image_size = 8x4, but module\.network\.sample_size = 8"),
        (_data(num_classes=10), r"data\.num_classes = 10, but module\.num_classes = 3"),
        (_data(num_classes=None), r"data\.num_classes = null, but module\.num_classes = 3.*class_conditional to false"),
    ],
)
def test_mismatches_name_both_keys_and_values(tiny, data, message):
    with pytest.raises(UserError, match=message):
        tiny.module("vp", class_conditional=True, num_classes=3).check_data(data)


def test_a_vae_decides_what_images_fit(tiny):
    module = tiny.module("vp", tiny.unet(4, 4), vae=tiny.vae())
    module.check_data(_data((3, 8, 8)))
    with pytest.raises(UserError, match=r"data\.channels = 1, but module\.vae in_channels = 3"):
        module.check_data(_data((1, 8, 8)))
    with pytest.raises(UserError, match=r"image_size = 4, but module\.network\.sample_size x 2 \(of module\.vae\) = 8"):
        module.check_data(_data((3, 4, 4)))
    with pytest.raises(UserError, match=r"in_channels = 2, but module\.vae latent_channels = 4"):
        tiny.module("vp", tiny.unet(4, 2), vae=tiny.vae()).check_data(_data((3, 8, 8)))
