"""An example's file is named by what it was made of."""

from models import conditioning
from models.distillation import encoding


def name(raw, tmp_path, **changes):
    size = {"width": 32, "height": 16, "num_frames": 5, **changes}
    encoder = encoding.Encoder(
        folder=tmp_path, model="m", target=conditioning.Target(**size), load=lambda: None
    )
    return encoder._path(raw)


def test_a_first_frame_of_another_size_is_encoded_anew(tmp_path):
    image, text = encoding.Raw(prompt="a", image_key="k"), encoding.Raw(prompt="a")
    others = [{}, {"width": 48}, {"height": 32}, {"num_frames": 9}]
    assert len({name(image, tmp_path, **changes) for changes in others}) == len(others)
    assert len({name(text, tmp_path, **changes) for changes in others}) == 1
