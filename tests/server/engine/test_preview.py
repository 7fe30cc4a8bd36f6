import torch
import torch.nn.functional as F

from server.engine.tick.preview import fit_preview, previews, to_uint8
from tests.server.toy_model import Toy


def test_a_preview_shows_the_colours_of_the_picture(trained):
    """Checked on a picture half red, half white, as the model's own autoencoder encodes it."""
    picture = torch.ones(1, 3, 128, 128)
    picture[:, 1:, :, :64] = -1
    with torch.inference_mode():
        latents = trained.encode_image(picture)
        small = previews(latents, fit_preview(trained))[0].numpy()
        decoded = to_uint8(trained.decode(latents))[0].numpy()
    assert small.shape == (64, 64, 3)
    # Compared with the decoder's picture, since the autoencoder's errors are not the preview's.
    for left, right in ((slice(4, 28), slice(8, 56)), (slice(36, 60), slice(72, 120))):
        ours = small[8:56, left].reshape(-1, 3).mean(0)
        theirs = decoded[16:112, right].reshape(-1, 3).mean(0)
        assert abs(ours - theirs).max() < 40


def test_a_preview_has_no_border_that_the_picture_has_not(trained):
    picture = torch.tensor([-0.6, 0.1, 0.7]).view(1, 3, 1, 1).expand(1, 3, 128, 128)
    with torch.inference_mode():
        small = previews(trained.encode_image(picture), fit_preview(trained))[0].float()
    middle = small[24:40, 24:40].mean((0, 1))
    assert (small - middle).abs().max() < 24


def test_a_preview_of_a_single_cell_is_one_colour():
    model = Toy()
    small = previews(torch.ones(1, 4, 1, 1), fit_preview(model))
    assert small.shape == (1, 4, 4, 3)
    assert len(small.flatten(0, 2).unique(dim=0)) == 1


class ManyChannels(Toy):
    """Encodes each color in many channels, so that many fits of the preview are possible."""

    def encode_image(self, pixels):
        return F.avg_pool2d(pixels, 8).repeat(1, 43, 1, 1)[:, :128]


def test_a_preview_of_many_channels_needs_no_products_of_them():
    model = ManyChannels()
    factors = fit_preview(model)
    assert factors.shape == (129, 3)
    orange = torch.tensor([1.0, 0.0, -1.0]).view(1, 3, 1, 1).expand(1, 3, 32, 32)
    small = previews(model.encode_image(orange), factors)[0]
    assert small[8, 8].tolist() == [255, 128, 0]


def test_pixels_are_rounded_as_diffusers_rounds_them():
    values = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0]).view(1, 1, 1, 5).expand(1, 3, 1, 5)
    assert to_uint8(values)[0, 0, :, 0].tolist() == [0, 0, 128, 255, 255]
