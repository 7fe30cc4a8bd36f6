"""IP-Adapters by name: which fit a model, how much memory they take, and what is refused."""

from __future__ import annotations

import gc
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from server.errors import ImagePromptMismatch, Overloaded
from server.models import memory as device_memory
from server.models import parts
from server.models.folder import read_json
from server.models.image_prompts.image_prompt import Widths
from server.models.image_prompts.shelf import ImagePromptShelf
from server.models.image_prompts.unet_image_prompts import UNetImagePrompts
from server.models.memory import DeviceMemory
from server.models.parts import known_entries
from server.models.weight_memory import WeightMemory
from tests.server.models.image_prompts.tiny_image_prompts import put_adapter, put_encoder
from tests.server.models.tiny_sdxl import UNET

SINGLE_FILE = Path(parts.__file__).parent / "single_file"
LAYER = "ip_adapter.1.to_k_ip.weight"


@pytest.fixture(scope="module")
def unet() -> Any:
    return UNet2DConditionModel(**UNET)


@pytest.fixture(scope="module")
def source(unet: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a plain adapter, one called plus, and their encoder."""
    folder = tmp_path_factory.mktemp("source")
    put_adapter(unet, folder, "plain", 1)
    put_adapter(unet, folder, "plus", 2, tokens=5)
    put_encoder(folder)
    return folder


@pytest.fixture
def folder(source: Path, tmp_path: Path) -> Path:
    """A copy, which a test may damage."""
    for file in source.rglob("*"):
        if file.is_file():
            copied = tmp_path / file.relative_to(source)
            copied.parent.mkdir(exist_ok=True)
            copied.write_bytes(file.read_bytes())
    return tmp_path


def shelved(
    folder: Path, unet: Any, max_bytes: int = 2**26
) -> tuple[ImagePromptShelf, WeightMemory[Any]]:
    memory = WeightMemory[Any](max_bytes, "IP-Adapters")
    widths = UNetImagePrompts(unet).widths
    own = "small", widths, memory, torch.device("cpu"), torch.float32
    return ImagePromptShelf([folder], *own), memory


def changed(folder: Path, change: Callable[[dict[str, Tensor]], object], name: str) -> None:
    state = load_file(folder / f"{name}.safetensors")
    change(state)
    save_file(state, folder / f"{name}.safetensors")


def test_those_are_listed_that_fit_the_model(folder: Path, unet: Any) -> None:
    config: dict[str, Any] = UNET | {"cross_attention_dim": 32}
    narrow: Any = UNet2DConditionModel(**config)
    put_adapter(narrow, folder, "narrow", 1)
    (folder / "notes.txt").touch()
    shelf, _ = shelved(folder, unet)
    listed = [(one.name, one.kind, one.tokens) for one in shelf.available()]
    assert listed == [("plain", "plain", 4), ("plus", "plus", 5)]
    put_adapter(unet, folder, "later", 3)
    assert "later" in [one.name for one in shelf.available()]
    none = ImagePromptShelf([folder], "other", None, *shelf_parts())
    assert none.available() == ()
    with pytest.raises(ImagePromptMismatch, match="model 'other' takes no image prompts"):
        none.find("plain")


def shelf_parts() -> tuple[WeightMemory[Any], torch.device, torch.dtype]:
    return WeightMemory[Any](0, "IP-Adapters"), torch.device("cpu"), torch.float32


def one_missing(folder: Path) -> None:
    changed(folder, lambda state: state.pop(LAYER), "plain")


def one_left_over(folder: Path) -> None:
    lora = {"ip_adapter.0.to_k_lora.down.weight": torch.zeros(2, 2)}
    changed(folder, lambda state: state.update(lora), "plain")


def other_layers(folder: Path) -> None:
    changed(folder, lambda state: state.update({LAYER: torch.zeros(8, 80)}), "plain")


def other_text(folder: Path) -> None:
    wide = torch.zeros(4 * 32, 24)
    changed(folder, lambda state: state.update({"image_proj.proj.weight": wide}), "plain")


def no_projection(folder: Path) -> None:
    changed(folder, lambda state: state.pop("image_proj.norm.bias"), "plain")


def of_faces(folder: Path) -> None:
    def face(state: dict[str, Tensor]) -> None:
        state["image_proj.proj.0.weight"] = state.pop("image_proj.proj.weight")

    changed(folder, face, "plain")


def no_tensors(folder: Path) -> None:
    (folder / "plain.safetensors").write_text("a pickle")


def other_encoder(folder: Path) -> None:
    edit(folder / "image_encoder" / "config.json", projection_dim=32)


def two_encoders(folder: Path) -> None:
    put_encoder(folder, "another")


def strange_encoder(folder: Path) -> None:
    edit(folder / "image_encoder" / "config.json", image_size="large")


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (one_missing, f" does not fit model 'small': it lacks the tensor {LAYER}."),
        (
            one_left_over,
            " does not fit model 'small': it has, beyond the model's layers, the tensor "
            "ip_adapter.0.to_k_lora.down.weight.",
        ),
        (other_layers, " does not fit model 'small': it has in another shape than the model's"),
        (
            other_text,
            " does not fit model 'small': it makes tokens of 32 features, where those of the text "
            "have 80.",
        ),
        (
            no_projection,
            " does not fit model 'small': it has a projection of another shape than diffusers': "
            'Missing key(s) in state_dict: "norm.bias".',
        ),
        (of_faces, " does not fit model 'small': it is neither of the plain kind nor of the kind"),
        (no_tensors, " is not a readable safetensors file: "),
        (
            other_encoder,
            ": it reads 24 features of an image encoder in a folder next to it, and none has as "
            "many; there are: image_encoder.",
        ),
        (two_encoders, ": it reads 24 features of an image encoder in a folder next to it, and"),
        (strange_encoder, ": config.json of image encoder 'image_encoder' must have the whole"),
    ],
)
def test_what_does_not_fit_is_refused_by_name_and_without_its_place(
    folder: Path, unet: Any, spoil: Callable[[Path], None], says: str
) -> None:
    spoil(folder)
    shelf, _ = shelved(folder, unet)
    begins = re.escape(f"IP-Adapter 'plain'{says}")
    with pytest.raises(ImagePromptMismatch, match=f"^{begins}") as refused:
        shelf.load("plain")
    assert str(folder) not in refused.value.message


def test_a_folder_is_listed_again_only_once_something_is_added(
    folder: Path, unet: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed: list[Path] = []
    iterdir = Path.iterdir

    def noted(path: Path) -> Any:
        listed.append(path)
        return iterdir(path)

    monkeypatch.setattr(Path, "iterdir", noted)
    os.utime(folder, (0, 0))
    shelf, _ = shelved(folder, unet)
    shelf.find("plain")
    listed.clear()
    shelf.find("plain")
    assert listed == []
    # The folder itself does not change: an encoder's files are examined each time.
    edit(folder / "image_encoder" / "config.json", projection_dim=32)
    with pytest.raises(ImagePromptMismatch, match="none has as many"):
        shelf.find("plain")
    put_encoder(folder, "another")
    assert shelf.find("plain").encoder.path.name == "another"


def test_an_encoder_whose_weights_are_missing_or_others_is_refused(folder: Path, unet: Any) -> None:
    encoder = folder / "image_encoder"
    (encoder / "model.safetensors").unlink()
    shelf, _ = shelved(folder, unet)
    with pytest.raises(ImagePromptMismatch, match=r"^image encoder 'image_encoder' has no model\."):
        shelf.load("plain")
    put_encoder(folder)
    edit(encoder / "config.json", intermediate_size=40)
    with pytest.raises(ImagePromptMismatch, match=r"^image encoder 'image_encoder' has in another"):
        shelf.load("plain")


def test_an_encoder_is_loaded_once_for_its_adapters_and_counts_once(
    folder: Path, unet: Any
) -> None:
    shelf, memory = shelved(folder, unet)
    plain, plus = shelf.load("plain"), shelf.load("plus")
    assert plus.encoder is plain.encoder
    assert shelf.load("plain") is plain
    held = (plain, plus, plain.encoder)
    assert memory.bytes == sum(one.nbytes for one in held)
    for one in (plain, plus):
        tensors = [*one.projection.parameters(), one.keys_and_values]
        assert one.nbytes == sum(tensor.nbytes for tensor in tensors)
    del plain, plus, held, one, tensors
    shelf.forget()
    gc.collect()
    assert memory.bytes == 0


def test_what_never_fits_together_is_refused_for_good_and_what_does_not_now_for_the_moment(
    folder: Path, unet: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf, _ = shelved(folder, unet)
    both = [shelf.find(name) for name in ("plain", "plus")]
    needed = [one.nbytes(torch.float32) for one in both]
    small, _ = shelved(folder, unet, max_bytes=needed[0] - 1)
    with pytest.raises(ImagePromptMismatch, match=f"'plain' takes {needed[0]} bytes of memory"):
        small.find("plain")
    tight, _ = shelved(folder, unet, max_bytes=max(needed))
    with pytest.raises(ImagePromptMismatch, match="of this request take"):
        tight.check_together(both)
    tight.check_together([both[0], both[0]])
    held = tight.load("plus")
    with pytest.raises(Overloaded, match="IP-Adapters of running requests fill"):
        tight.load("plain")
    assert held.name == "plus"
    monkeypatch.setattr(device_memory, "measure", lambda _: DeviceMemory(9, 10**9))
    with pytest.raises(Overloaded, match=r"needs \d+ bytes of memory, of which 9 are free"):
        shelf.load("plain")


@pytest.mark.parametrize(
    ("family", "text", "layers"),
    [
        ("sd15", 768, [320] * 2 + [640] * 2 + [1280] * 5 + [640] * 3 + [320] * 3 + [1280]),
        ("sdxl", 2048, [640] * 4 + [1280] * 20 + [1280] * 30 + [640] * 6 + [1280] * 10),
    ],
)
def test_layers_are_in_the_order_of_the_published_files(
    family: str, text: int, layers: list[int]
) -> None:
    """The widths of ``ip_adapter.1``, ``ip_adapter.3``, and so on; the middle comes last."""
    config = read_json(SINGLE_FILE / family, "unet/config.json")
    with torch.device("meta"):
        unet = UNet2DConditionModel(**known_entries(config, UNet2DConditionModel.__init__))
    assert UNetImagePrompts(unet).widths == Widths(text, tuple(layers))


def edit(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
