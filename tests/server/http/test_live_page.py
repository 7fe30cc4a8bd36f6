"""The page's tab for live streams, in a real browser and with a real server."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.settings import Settings
from tests.server.conftest import Running
from tests.server.http.browser import Tab, new_tab
from tests.server.models.image_prompts.tiny_image_prompts import put_adapter, put_encoder

KEY = "a-key-of-the-test-suite-of-the-page"
MIN_DIFFERENCE = 4
"""Least mean difference of the bytes of two pictures at which they count as different."""

WATCHED = """
var refused = [];
document.addEventListener("securitypolicyviolation", (event) => refused.push(event.blockedURI));
"""

TOOLS = """
const $ = (id) => document.getElementById(id);
const form = $("live-form");
const until = async (there) => {
  while (!await there()) await new Promise((resolve) => setTimeout(resolve, 10));
};
const change = (element, value) => {
  element.value = value;
  element.dispatchEvent(new Event("input", { bubbles: true }));
  element.dispatchEvent(new Event("change", { bubbles: true }));
};
const loaded = () => until(() => form.model.options.length);
const point = (kind, x, y) => {
  const { left, top, width, height } = $("drawing").getBoundingClientRect();
  const at = { clientX: left + x * width, clientY: top + y * height };
  $("drawing").dispatchEvent(new PointerEvent(kind, { ...at, pointerId: 1, bubbles: true }));
};
const stroke = () => {
  $("drawing").setPointerCapture = $("drawing").hasPointerCapture = () => true;
  point("pointerdown", 0.2, 0.3);
  for (let x = 0.2; x < 0.8; x += 0.1) point("pointermove", x, 0.7);
};
const said = () => $("live-said").textContent;
const pixels = async () => {
  const image = new Image();
  image.src = $("live-picture").src;
  await image.decode();
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
  const context = canvas.getContext("2d");
  context.drawImage(image, 0, 0);
  return [...context.getImageData(0, 0, canvas.width, canvas.height).data];
};
const distance = (one, other) => {
  return one.reduce((sum, value, index) => sum + Math.abs(value - other[index]), 0) / one.length;
};
const shown = () => until(() => $("live-picture").src.startsWith("blob:"));
/** Waits until the picture is clearly another one than the one with these pixels; its pixels. */
const other = async (before) => {
  let after;
  await until(async () => distance(after = await pixels(), before) > LEAST);
  return after;
};
""".replace("LEAST", str(MIN_DIFFERENCE))
LIVE = """
await loaded();
form.steps.value = 2;
form.seed.value = 5;
form.requestSubmit();
await shown();
"""


VISITS = itertools.count()


@pytest.fixture(scope="module")
def any_tab(browser: str) -> Iterator[Tab]:
    """A tab of the browser for all tests, as opening one takes a second."""
    with new_tab(browser, TOOLS) as tab:
        yield tab


@pytest.fixture
def tab(any_tab: Tab, trained: Running) -> Tab:
    """The tab for live streams."""
    any_tab.open(f"{trained.url}/?{next(VISITS)}#live")
    return any_tab


@pytest.fixture
def style(trained: Running, trained_image_prompts: Path) -> Iterator[str]:
    """The name of an IP-Adapter that the embedded model has for one test."""
    [model, *_] = trained.app.state.service.ready_shelf().loaded()
    before = {*trained_image_prompts.iterdir()}
    put_encoder(trained_image_prompts)
    put_adapter(model.modules()["unet"], trained_image_prompts, "style", 1)
    yield "style"
    for made in {*trained_image_prompts.iterdir()} - before:
        shutil.rmtree(made) if made.is_dir() else made.unlink()


def test_a_stroke_and_another_prompt_change_the_picture(tab: Tab) -> None:
    got = tab.run(
        LIVE
        + """
        const first = await pixels();
        stroke();
        const drawn = await other(first);
        change(form.prompt, "a small blue square on a black background");
        await other(drawn);
        const figures = ["fps", "latency", "dropped"].map((one) => $(`live-${one}`).textContent);
        return { said: said(), figures };
        """
    )
    assert got["said"].startswith("Live, 1 evaluation a frame.")
    fps, latency, dropped = got["figures"]
    assert float(fps) > 0
    assert latency.endswith(" ms")
    assert dropped == "0"


def test_the_keyboard_draws_too(tab: Tab) -> None:
    tab.run(
        LIVE
        + """
        const first = await pixels();
        const press = (key) => $("drawing").dispatchEvent(new KeyboardEvent("keydown", { key }));
        $("drawing").focus();
        press(" ");
        for (const key of ["ArrowDown", "ArrowLeft"]) for (let n = 0; n < 12; n += 1) press(key);
        await other(first);
        """
    )


def test_the_webcam_is_a_source_of_frames(tab: Tab) -> None:
    got = tab.run(
        LIVE
        + """
        const drawn = await pixels();
        document.querySelector("[value=webcam]").click();
        const filmed = await other(drawn);
        let frames = 0;
        const counting = new MutationObserver(() => { frames += 1; });
        counting.observe($("live-picture"), { attributes: true });
        await until(() => frames > 4);
        document.querySelector("[value=drawing]").click();
        await other(filmed);
        return [$("webcam").srcObject, $("webcam").hidden, said()];
        """
    )
    assert got[:2] == [None, True]
    assert got[2].startswith("Live")


def test_a_paused_stream_stands_still_until_it_goes_on(tab: Tab) -> None:
    got = tab.run(
        LIVE
        + """
        const first = await pixels();
        $("live-pause").click();
        await new Promise((resolve) => setTimeout(resolve, 300));
        stroke();
        await new Promise((resolve) => setTimeout(resolve, 300));
        const paused = [distance(first, await pixels()), $("live-pause").ariaPressed];
        $("live-pause").click();
        await other(first);
        form.requestSubmit();
        await until(() => said() === "Stopped.");
        return [...paused, $("live-pause").ariaPressed, $("live-start").textContent];
        """
    )
    assert got == [0, "true", "false", "Start"]


def test_an_image_prompt_changes_the_picture_until_it_is_removed(style: str, tab: Tab) -> None:
    with_it, without, sentences = tab.run(
        """
        await loaded();
        change(form.model, "embedded");
        """
        + LIVE
        + """
        const place = $("live-image-prompts");
        const sentences = [place.closest("details").hidden];
        const first = await pixels();
        place.lastChild.click();
        const names = place.querySelector("select");
        change(names, "STYLE");
        const canvas = Object.assign(document.createElement("canvas"), { width: 8, height: 8 });
        canvas.getContext("2d").fillRect(0, 0, 8, 4);
        const square = await new Promise((resolve) => canvas.toBlob(resolve));
        const dataTransfer = new DataTransfer();
        dataTransfer.items.add(new File([square], "square.png", { type: "image/png" }));
        change(place.querySelector("[type=number]"), 4);
        const dropped = new DragEvent("drop", { dataTransfer, cancelable: true });
        place.querySelector(".upload").dispatchEvent(dropped);
        const drawn = await other(first);
        sentences.push($("live-said").className);
        place.querySelector("fieldset").lastChild.click();
        const again = await other(drawn);
        return [distance(drawn, first), distance(again, first), sentences];
        """.replace("STYLE", style)
    )
    assert with_it > MIN_DIFFERENCE
    assert without == 0
    assert sentences == [False, ""]


def test_frames_of_a_model_that_edits_pictures_may_be_such_a_picture(
    tab: Tab, trained: Running
) -> None:
    """Checks what the page sends with a catalog in which the model reads two pictures."""
    edits = """
    const ask = window.fetch;
    window.fetch = async (...asked) => {
      const answer = await ask(...asked);
      if (asked[0] !== "/v1/catalog") return answer;
      const catalog = await answer.json();
      for (const model of catalog.models) model.reference_images = 2;
      return Response.json(catalog);
    };
    const send = WebSocket.prototype.send;
    window.sent = [];
    WebSocket.prototype.send = function (data) {
      window.sent.push(data);
      send.call(this, data);
    };
    """
    tab.open(f"{trained.url}/", edits)
    sent = tab.run(
        """
        $("live-tab").click();
        await loaded();
        form.frames_as.value = "references";
        $("live-reference-images").lastChild.click();
        const picture = document.createElement("canvas").toDataURL();
        $("live-reference-images").querySelector(".upload").put(picture);
        form.requestSubmit();
        await until(() => window.sent.length);
        await until(() => $("live-said").className === "error");
        const refusal = said();
        change(form.frames_as, "frames");
        await until(() => window.sent.length === 2);
        return [picture, refusal, ...window.sent];
        """
    )
    picture, said, first, second = sent[0], sent[1], *map(json.loads, sent[2:])
    assert first["source"] == "references"
    assert first["reference_images"] == [picture]
    assert "strength" not in first
    assert "does not read reference images" in said
    assert (second["source"], second["strength"]) == ("frames", 0.75)


def test_a_refused_setting_is_shown_as_a_sentence_and_the_stream_goes_on(tab: Tab) -> None:
    got = tab.run(
        LIVE
        + """
        const first = await pixels();
        change(form.steps, 100000);
        await until(() => $("live-said").className === "error");
        const refusal = said();
        stroke();
        const drawn = await other(first);
        change(form.steps, 3);
        await until(() => $("live-said").className === "");
        return [refusal, said()];
        """
    )
    assert got[0].startswith("steps is 100000; at most ")
    assert got[1].startswith("Live, 2 evaluations a frame.")


def test_a_stream_whose_frames_are_refused_says_so_once_and_waits_for_other_settings(
    tab: Tab, trained: Running
) -> None:
    """They are refused here because pictures of their size lately did not fit in memory."""
    count = """
    const NativeSocket = window.WebSocket;
    window.refusals = 0;
    window.WebSocket = class extends NativeSocket {
      constructor(...given) {
        super(...given);
        this.addEventListener("message", ({ data }) => {
          if (typeof data === "string" && "error" in JSON.parse(data)) window.refusals += 1;
        });
      }
    };
    """
    tab.open(f"{trained.url}/?again#live", count)
    tab.run(LIVE)
    overflows = trained.app.state.service.engine._overflows
    overflows.note("embedded-lcm", 64, 64, None, free=0)
    try:
        said, refusals = tab.run(
            """
            const stroked = () => { stroke(); return new Promise((done) => setTimeout(done, 50)); };
            while ($("live-said").className !== "error") await stroked();
            for (let n = 0; n < 8; n += 1) await stroked();
            return [said(), window.refusals];
            """
        )
    finally:
        overflows.forget()
    assert said.startswith("width x height is 128 x 128; an image of 64 x 64 pixels did not fit")
    assert said.endswith("The stream waits until its settings change.")
    assert refusals <= 4, "frames that were under way together"
    again = tab.run(
        """
        const before = await pixels();
        change(form.prompt, "a small blue square on a black background");
        await other(before);
        return said();
        """
    )
    assert again.startswith("Live")


def test_the_tab_opens_at_the_model_of_the_fewest_steps(tab: Tab) -> None:
    got = tab.run(
        """
        await loaded();
        const choices = () => [form.model.value, form.steps.value, form.steps.placeholder];
        const first = choices();
        change(form.model, "embedded");
        return [first, choices()];
        """
    )
    assert got == [["embedded-lcm", "", "4"], ["embedded", "8", "25"]]


def test_the_tabs_are_those_of_the_address_and_of_the_arrow_keys(tab: Tab) -> None:
    got = tab.run(
        """
        const open = () => [...document.querySelectorAll("[role=tabpanel]")]
          .filter((panel) => panel.checkVisibility()).map((panel) => panel.id);
        const opened = [open()];
        const press = (key) => {
          document.activeElement.dispatchEvent(new KeyboardEvent("keydown", { key }));
        };
        $("live-tab").focus();
        for (const key of ["ArrowRight", "ArrowLeft"]) {
          press(key);
          await until(() => document.activeElement.ariaSelected === "true");
          opened.push([...open(), location.hash]);
        }
        return opened;
        """
    )
    assert got == [["live-panel"], ["rows-panel", "#rows"], ["live-panel", "#live"]]


@pytest.fixture(scope="module")
def locked() -> Iterator[Running]:
    """A server with a key, which allows one stream."""
    settings = {"api_keys": [KEY], "streams": {"sessions": 1}, "row_budget": 2}
    server = Running(Settings.model_validate(settings))
    server.start()
    yield server
    server.stop()


def test_the_stream_opens_with_the_key_and_its_refusals_are_sentences(
    browser: str, locked: Running
) -> None:
    with new_tab(browser, TOOLS) as tab:
        tab.open(f"{locked.url}/#live", WATCHED)
        got = tab.run(
            f"""
            await until(() => said());
            const asked = [said(), $("key").hidden];
            $("key").querySelector("input").value = {json.dumps(KEY)};
            form.requestSubmit();
            await loaded();
            await shown();
            return [...asked, refused];
            """
        )
        assert got == [
            "A valid API key is required; send 'Authorization: Bearer <key>'.",
            False,
            [],
        ]
        with new_tab(browser, TOOLS) as second:
            second.open(f"{locked.url}/#live")
            said = second.run(
                f"""
                await until(() => said());
                $("key").querySelector("input").value = {json.dumps(KEY)};
                form.requestSubmit();
                await until(() => said().startsWith("As many"));
                return [said(), $("live-start").textContent];
                """
            )
            assert said == [
                "As many live streams are open as the server allows; try again later.",
                "Start",
            ]
