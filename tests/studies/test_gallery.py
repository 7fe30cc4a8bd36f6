"""The gallery shows every sampler and rule, and its page contains each grid."""

from pathlib import Path

from PIL import Image

from guidance import RULES
from samplers import SAMPLERS
from studies import gallery
from studies.gallery import Pictures, Sheet, all_sheets, grid

PAGE = Path(__file__).parents[2] / "docs/gallery.md"


def test_every_sampler_and_rule_has_a_grid() -> None:
    named = {sheet.name for sheet in all_sheets()}
    samplers = {f"sampler-{kind.model_fields['name'].default}" for kind in SAMPLERS}
    # Pictures without guidance are the first column of the others.
    rules = {f"rule-{kind.model_fields['name'].default}" for kind in RULES} - {"rule-none"}
    assert named >= samplers | rules


def test_every_grid_is_on_the_page() -> None:
    page = PAGE.read_text("utf-8")
    missing = [one.name for one in all_sheets() if f"(images/gallery/{one.name}.webp)" not in page]
    assert not missing


def test_a_grid_has_its_pictures_where_its_labels_say(tmp_path: Path) -> None:
    sheet = Sheet("two", {"red": {"steps": 1}, "blue": {"steps": 2}})
    pictures = Pictures(tmp_path)
    for row in sheet.requests():
        for request, colour in zip(row, ("red", "blue"), strict=True):
            Image.new("RGB", (128, 128), colour).save(pictures.path(request))
    page = grid(sheet, pictures)
    side = 128 + gallery.EDGE
    assert page.size == (gallery.EDGE + 2 * side, gallery.LINE + 3 * (side + gallery.LINE))
    for row in range(3):
        y = gallery.LINE + row * (side + gallery.LINE) + gallery.LINE + 64
        assert page.getpixel((gallery.EDGE + 64, y)) == (255, 0, 0)
        assert page.getpixel((gallery.EDGE + side + 64, y)) == (0, 0, 255)
