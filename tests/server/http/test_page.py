"""The page at `/`: its text, and, if this machine has a browser, what it does in one."""

from __future__ import annotations

import base64
import io
import itertools
import json
import shlex
from collections.abc import Callable, Iterator
from typing import Any

import httpx2
import pytest
from PIL import Image

from guidance import CFG
from guidance.embedded import Embedded
from samplers import LCM, LCMSpacing
from server.http.documents import WEB
from server.models.defaults import ModelDefaults
from server.requests.adapters import MAX_ADAPTERS
from server.requests.catalog import Catalog, catalog, defaults_of
from server.requests.controls import MAX_CONTROLS
from server.requests.image_prompts import MAX_IMAGE_PROMPTS
from server.requests.schema import GenerateRequest, guidance_of
from tests.server.conftest import Running
from tests.server.http.browser import Tab, new_tab

PAGE = "\n".join(
    file.read_text("utf-8")
    for file in (WEB / "index.html", *sorted((WEB / "page").iterdir()))
    if file.name != "presets.js"
)
CHOICES = {
    choice.entries: choice.field + (".0" if choice.most > 1 else "") for choice in catalog().choices
}
"""Where the page puts its choice from each list of the catalog."""

WORDS = {"upscalers": "upscaler", "mask_contents": "mask_content"}
"""The page's input for each list of the catalog that has only names."""

TOOLS = """
const $ = (id) => document.getElementById(id);
const form = $("form");
const until = async (there) => {
  const late = performance.now() + 30000;
  while (!await there()) {
    if (performance.now() > late) throw new Error(`late: ${there}; "${$("said").textContent}"`);
    await new Promise((resolve) => setTimeout(resolve, 10));
  }
};
const selects = () => [...document.querySelectorAll("#more fieldset.picker > select")];
const titles = TITLES;
const select = (title) => selects()[titles.indexOf(title)];
const pick = (title, option) => {
  select(title).value = option;
  select(title).dispatchEvent(new Event("change", { bubbles: true }));
};
const tiles = (kind = "") => [...document.querySelectorAll(`#pictures .tile${kind}`)];
const ended = () => until(() => !tiles(".running").length);
const press = async () => {
  form.requestSubmit();
  await ended();
};
const texts = (selector) => [...document.querySelectorAll(selector)].map((one) => one.textContent);
const base64 = (blob) => new Promise((resolve) => {
  const reader = new FileReader();
  reader.onload = () => resolve(reader.result.split(",")[1]);
  reader.readAsDataURL(blob);
});
const kept = async () => (await import("/page/gallery_store.js")).kept();
/** The gallery's files in base64, the oldest first. */
const pictures = async () => {
  await until(async () => (await kept()).length === tiles().length);
  return Promise.all((await kept()).map(({ blob }) => base64(blob)));
};
const act = (name) => [...$("actions").children].find((one) => one.textContent === name).click();
""".replace("TITLES", json.dumps([*CHOICES]))

FRESH = 'indexedDB.deleteDatabase("weft");'
"""Empties the browser's gallery before the page first looks into it."""

OF_ITS_OWN = 'form.width.value = form.height.value = "";'
"""Lets the server choose the size."""

READY = f"await until(() => selects().length === {len(CHOICES)});"


@pytest.fixture(scope="module")
def any_tab(browser: str) -> Iterator[Tab]:
    """A tab of the browser for all tests, as opening one takes a second."""
    with new_tab(browser, TOOLS) as tab:
        yield tab


@pytest.fixture
def tab(any_tab: Tab, client: httpx2.Client) -> Tab:
    """The server's page, ready to use."""
    any_tab.call("Emulation.clearDeviceMetricsOverride")
    any_tab.open(str(client.base_url), FRESH)
    any_tab.run(f"{READY} form.steps.value = 2; form.width.value = form.height.value = 64")
    return any_tab


def test_the_api_s_page_is_drawn_without_any_other_server(tab: Tab, client: httpx2.Client) -> None:
    tab.open(
        f"{client.base_url}/docs",
        "var refused = []; document.addEventListener("
        "'securitypolicyviolation', (event) => refused.push(event.blockedURI));",
    )
    paths = tab.run(
        """
        await until(() => document.querySelector(".opblock-summary-path"));
        return [texts(".opblock-summary-path"), refused];
        """.replace("form", "x")
    )
    assert "/v1/generate" in {path.replace("\u200b", "") for path in paths[0]}
    assert paths[1] == []


def test_the_page_offers_every_list_of_the_catalog(tab: Tab) -> None:
    legends = tab.run("return texts('#more fieldset.picker > legend')")
    assert sorted(legends) == sorted(choice.title for choice in catalog().choices)
    assert {*CHOICES, *WORDS} == {*Catalog.model_fields} - {"choices", "defaults", "models"}
    for words, name in WORDS.items():
        offered = tab.run(f"return [...form.{name}.options].slice(1).map(({{ value }}) => value)")
        assert tuple(offered) == getattr(catalog(), words)


def test_the_page_spells_nothing_that_the_catalog_lists() -> None:
    names = {entry.name for title in CHOICES for entry in getattr(catalog(), title)} - {*CHOICES}
    names |= {word for words in WORDS for word in getattr(catalog(), words)}
    assert not [name for name in names if f'"{name}"' in PAGE]


def test_every_control_of_the_page_has_a_name(tab: Tab) -> None:
    nameless = tab.run(
        """
        $("live-tab").click();
        await until(() => document.querySelector("#live-choices select"));
        return [...document.querySelectorAll("input, select, textarea, button, canvas")]
          .filter((one) => !one.labels?.length && !one.ariaLabel && !one.textContent.trim())
          .map((one) => one.outerHTML);
        """
    )
    assert nameless == []


def test_the_page_as_it_opens_is_a_request_that_leaves_all_out(
    tab: Tab, generate: Callable[..., httpx2.Response]
) -> None:
    shown = tab.run(
        f"{OF_ITS_OWN} form.seed.value = 5; await press();"
        "return [form.prompt.value, await pictures()]"
    )
    answer = generate(prompt=shown[0], width=None, height=None)
    [picture] = answer.json()["images"]
    assert shown[1] == [picture["b64_json"]]


def test_the_page_opens_with_what_the_server_would_choose(tab: Tab, client: httpx2.Client) -> None:
    answer = client.get("/v1/catalog").json()
    shown = tab.run("return titles.map((title) => select(title).value)")
    for (title, path), name in zip(CHOICES.items(), shown, strict=True):
        chosen = _at(answer["defaults"], path.split("."))
        names = [entry["name"] for entry in answer[title]]
        assert name not in names if chosen is None else name == chosen["name"]


def test_every_choice_on_the_page_is_a_request(tab: Tab) -> None:
    sent = tab.run(
        """
        const sent = [];
        window.fetch = async (_, { body }) => { sent.at(-1).push(body); throw new Error("kept"); };
        for (const title of titles) {
          const first = select(title).value;
          for (const { value } of [...select(title).options]) {
            sent.push([title, value]);
            pick(title, value);
            await press();
          }
          pick(title, first);
        }
        return sent;
        """
    )
    named = set()
    for title, option, body in sent:
        GenerateRequest.model_validate_json(body)
        chosen = _at(json.loads(body), CHOICES[title].split("."))
        if chosen is not None:
            assert chosen.get("name", title) == option
            named.add((title, option))
    listed = {(title, entry.name) for title in CHOICES for entry in getattr(catalog(), title)}
    assert named == listed


def _at(body: Any, path: list[str]) -> Any:
    """What a body says at a path; None where it says nothing."""
    for part in path:
        if not body or part not in (body if isinstance(body, dict) else ["0"]):
            return None
        body = body[part] if isinstance(body, dict) else body[0]
    return body


def test_the_page_follows_the_sampler_to_its_own_guidance_until_another_is_chosen(
    tab: Tab, client: httpx2.Client
) -> None:
    rules = tab.run(
        """
        const rules = [];
        for (const sampler of ["dpm_solver_v3", "ddim", "dpm_solver_v3"]) {
          pick("samplers", sampler);
          rules.push(select("rules").value);
          if (sampler === "ddim") pick("rules", "tcfg");
        }
        return rules;
        """
    )
    defaults = client.get("/v1/catalog").json()["defaults"]
    fitted = defaults["guidance_by_sampler"]["dpm_solver_v3"]
    assert rules == [fitted["name"], defaults["guidance"]["name"], "tcfg"]


CONSISTENCY = ModelDefaults(
    sampler=LCM(),
    spacing=LCMSpacing(distilled_steps=40),
    steps=4,
    rule=CFG(scale=8.5),
    policy=Embedded(),
    convention="lcm",
    reason="the test says so",
)
BESIDE = """
const asked = window.fetch;
window.fetch = async (...request) => {
  const answer = await asked(...request);
  if (request[0] !== "/v1/catalog") return answer;
  const catalog = await answer.json();
  catalog.models.push({ ...catalog.models[0], name: "lcm", defaults: DEFAULTS });
  return Response.json(catalog);
};
""".replace("DEFAULTS", defaults_of(CONSISTENCY).model_dump_json())
"""A second model in the catalog, with defaults of its own."""


def test_the_page_draws_the_defaults_of_the_chosen_model(tab: Tab, client: httpx2.Client) -> None:
    tab.open(str(client.base_url), BESIDE)
    shown, sent = tab.run(
        """
        await until(() => selects().length === titles.length);
        const drawn = (...lists) => {
          return [form.steps.placeholder, ...lists.map((one) => select(one).value)];
        };
        const choose = (name) => {
          form.model.value = name;
          form.model.dispatchEvent(new Event("change"));
        };
        const shown = [], sent = [];
        window.fetch = async (_, { body }) => { sent.push(body); throw new Error("kept"); };
        for (const [title, name] of [[], ["samplers", "tcd"], ["samplers", "lcm"]]) {
          if (title) pick(title, name);
          else choose("lcm");
          await press();
          shown.push(drawn("samplers", "spacings", "rules", "policies"));
        }
        choose("embedded");
        shown.push(drawn("rules", "policies"));
        return [shown, sent];
        """
    )
    consistency = ["4", "lcm", "lcm", "cfg", "embedded"]
    blank = next(choice.blank for choice in catalog().choices if choice.field == "spacing")
    assert shown == [
        consistency,
        ["4", "tcd", blank, "cfg", "embedded"],
        consistency,
        ["25", "apg", "always"],
    ]
    first, other, again = map(GenerateRequest.model_validate_json, sent)
    assert (first.sampler, first.spacing) == (CONSISTENCY.sampler, CONSISTENCY.spacing)
    assert first.guidance == guidance_of(CONSISTENCY.rule, CONSISTENCY.policy)
    assert first.steps is None
    assert other.spacing is None
    assert again == first


FROM_A_FILE = """
const asked = window.fetch;
window.fetch = async (...request) => {
  const answer = await asked(...request);
  if (request[0] !== "/v1/catalog") return answer;
  const catalog = await answer.json();
  catalog.samplers.find(({ name }) => name === "ddim").plugin = "mine.py";
  return Response.json(catalog);
};
"""
"""A sampler of the catalog that a plug-in file defines."""


def test_the_page_says_which_file_a_sampler_is_from(tab: Tab, client: httpx2.Client) -> None:
    tab.open(str(client.base_url), FROM_A_FILE)
    shown = tab.run(
        """
        await until(() => selects().length === titles.length);
        return ["ddim", "euler"].map((name) => {
          pick("samplers", name);
          return select("samplers").closest("fieldset").textContent.includes("(from mine.py)");
        });
        """
    )
    assert shown == [True, False]


def test_the_page_shows_what_has_no_effect(tab: Tab) -> None:
    said = tab.run(
        """
        form.negative_prompt.value = "a square"; pick("rules", "none");
        await press();
        return texts("#said");
        """
    )
    assert said[0].endswith(
        "negative_prompt has no effect: guidance 'none' evaluates only the prompt."
    )


def test_the_page_shows_every_image_of_a_group(tab: Tab) -> None:
    shown = tab.run(
        """
        form.n.value = 3; form.seed.value = 5;
        pick("negtome", "negtome");
        await press();
        const labels = tiles().map(({ ariaLabel }) => ariaLabel.split(", ").at(-1));
        return { pictures: await pictures(), labels };
        """
    )
    assert len(set(shown["pictures"])) == 3
    assert shown["labels"] == ["seed 5", "seed 6", "seed 7"]


def test_the_page_may_show_images_at_urls_of_another_origin(
    any_tab: Tab, running: Running, client: httpx2.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = running.url.replace("127.0.0.1", "localhost")
    settings = running.app.state.settings
    results = settings.results.model_copy(update={"base_url": elsewhere})
    changed = settings.model_copy(update={"results": results})
    monkeypatch.setitem(running.app.state._state, "settings", changed)
    body: dict[str, Any] = {"prompt": "x", "steps": 1, "response_format": "url"}
    url: str = client.post("/v1/generate", json=body).json()["images"][0]["url"]
    assert url.startswith(elsewhere)
    any_tab.open(str(client.base_url), FRESH)
    fetched, shown = any_tab.run(
        f"""
        const blob = await (await fetch("{url}")).blob();
        const image = new Image();
        image.src = "{url}";
        await image.decode();
        return [blob.type, image.naturalWidth];
        """
    )
    assert (fetched, shown) == ("image/png", 128)


def test_the_page_shows_why_a_request_is_refused(tab: Tab) -> None:
    said = tab.run('pick("particles", "fkc"); await press(); return texts("#said.error")')
    assert said == ["n is 1; guidance.particles needs at least 2 images."]


def test_the_page_aims_at_what_the_model_s_classifier_knows(
    tab: Tab, client: httpx2.Client
) -> None:
    model = client.get("/v1/catalog").json()["models"][0]
    shown = tab.run(
        """
        pick("classifiers", "elucd");
        const labels = document.querySelectorAll("#more fieldset fieldset label");
        const classes = [...labels].map((label) => {
          const aim = label.querySelector("select");
          aim.selectedIndex = aim.options.length - 1;
          return [label.firstChild.data.trim(), [...aim.options].slice(1).map(({ text }) => text)];
        });
        await press();
        return { classes, text: texts("#curl"), pictures: await pictures() };
        """
    )
    assert dict(shown["classes"]) == model["classifier"]
    target = {attribute: classes[-1] for attribute, classes in model["classifier"].items()}
    assert _posted(shown["text"][0])[1]["guidance"]["classifier"]["target"] == target
    assert len(shown["pictures"]) == 1


@pytest.mark.parametrize(("n", "kind"), [(1, "image/png"), (2, "application/json")])
def test_the_command_that_the_page_shows_makes_the_same(
    tab: Tab, client: httpx2.Client, n: int, kind: str
) -> None:
    prompt = 'it\'s a "red" circle,\n100% of $HOME, `sh` and \\!'
    shown = tab.run(
        f"form.prompt.value = {json.dumps(prompt)}; form.n.value = {n};"
        "await press(); return { curl: texts('#curl')[0], pictures: await pictures() }"
    )
    headers, body = _posted(shown["curl"])
    assert body["prompt"] == prompt
    answer = client.post("/v1/generate", json=body, headers=headers)
    assert answer.headers["content-type"] == kind
    if n > 1:
        made = [image["b64_json"] for image in answer.json()["images"]]
    else:
        made = [base64.b64encode(answer.content).decode()]
    assert shown["pictures"] == made


def _posted(command: str) -> tuple[dict[str, str], Any]:
    """Headers and body of a curl command, as a shell reads it."""
    line, body, end = command.split("\n")
    assert (line[-13:], end) == ("-d @- <<'END'", "END")
    options = itertools.pairwise(shlex.split(line))
    headers = dict(word.split(": ", 1) for option, word in options if option == "-H")
    return headers, json.loads(body)


def test_pictures_come_first_on_phones_and_desktops(tab: Tab) -> None:
    for width, height in ((390, 844), (1280, 800)):
        tab.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        bottom, folded, across = tab.run(
            """
            const open = [...document.querySelectorAll("#more details")].filter((one) => one.open);
            const { scrollWidth } = document.documentElement;
            return [$("viewer").getBoundingClientRect().bottom, !open.length, scrollWidth];
            """
        )
        assert bottom <= height
        assert folded
        assert across <= width


def test_presets_wait_for_the_catalog(any_tab: Tab, client: httpx2.Client) -> None:
    """To the page, a server that is still loading is one whose first answer comes late."""
    held = "window.held = new Promise((go) => { window.go = go; }); const ask = window.fetch;"
    held += "window.fetch = async (...asked) => { await window.held; return ask(...asked); };"
    any_tab.open(str(client.base_url), FRESH + held)
    shown = """
        await until(() => $("presets").querySelectorAll("input").length === 3);
        const optional = ["image-prompts", "controls", "reference-images", "adapters"];
        const hidden = optional.map((id) => $(id).closest("[hidden]") !== null);
        return [$("presets").disabled, $("preset-words").textContent, hidden];
    """
    # What only some models have is not shown even for a moment.
    assert any_tab.run(shown) == [True, "Waiting for what the server offers.", [True] * 4]
    disabled, words, hidden = any_tab.run(f"window.go(); {READY} {shown}")
    assert (disabled, hidden) == (False, [True, True, True, False])
    assert words.startswith("What the server chooses")


def test_presets_ask_for_what_the_server_takes_without_a_warning(
    tab: Tab, client: httpx2.Client
) -> None:
    sent = tab.run(
        """
        const sent = [];
        window.fetch = async (_, { body }) => { sent.push(body); throw new Error("kept"); };
        for (const radio of $("presets").querySelectorAll("input")) {
          radio.click();
          await press();
        }
        return sent;
        """
    )
    bodies = [json.loads(body) for body in sent]
    shown = [(body["model"], body.get("steps")) for body in bodies]
    assert shown == [("embedded-lcm", None), ("embedded", None), ("embedded", 20)]
    assert GenerateRequest.model_validate(bodies[2]).guidance is not None
    for body in bodies:
        small = {"stream": False, "steps": 4, "width": 64, "height": 64}
        answer = client.post("/v1/generate", json={**body, **small})
        assert answer.status_code == 200
        assert answer.json()["warnings"] == []


def test_settings_come_back_from_the_gallery_and_from_a_dropped_file(
    tab: Tab, client: httpx2.Client
) -> None:
    again, dropped = tab.run(
        """
        form.prompt.value = "a blue square"; form.negative_prompt.value = "red";
        form.seed.value = 7;
        pick("samplers", "deis"); pick("policies", "reuse"); pick("cfg_norm", "cfg_norm");
        await press();
        const fields = ["prompt", "seed", "steps", "negative_prompt"];
        const lists = ["samplers", "policies", "cfg_norm"];
        const shown = () => [
          ...fields.map((one) => form[one].value), ...lists.map((one) => select(one).value),
        ];
        const clear = () => {
          $("presets").querySelector("[value=balanced]").click();
          form.prompt.value = "another"; form.seed.value = form.negative_prompt.value = "";
        };
        await until(async () => (await kept()).length);
        clear();
        act("Use settings");
        await until(() => form.seed.value === "7");
        const again = shown();
        clear();
        const [{ blob }] = await kept();
        const data = new DataTransfer();
        data.items.add(new File([blob], "made.png"));
        window.dispatchEvent(new DragEvent("drop", { dataTransfer: data, cancelable: true }));
        await until(() => form.seed.value === "7");
        return [again, shown()];
        """
    )
    assert again == ["a blue square", "7", "2", "red", "deis", "reuse", "cfg_norm"]
    assert dropped == again
    tab.open(str(client.base_url))
    after_reload = tab.run(
        READY + "await until(() => tiles().length); return tiles().map((one) => one.ariaLabel);"
    )
    assert after_reload == ["a blue square, seed 7"]


MORE = """
const asked = window.fetch;
window.fetch = async (...request) => {
  const answer = await asked(...request);
  if (request[0] !== "/v1/catalog") return answer;
  const catalog = await answer.json();
  Object.assign(catalog.models[0], {
    embeddings: [{ name: "inkstyle", vectors: 2 }],
    image_prompts: [{ name: "plain" }, { name: "plus" }],
    controls: [{ name: "canny" }],
    adapters: [{ name: "pastel" }, { name: "ink" }],
    reference_images: 1,
  });
  return Response.json(catalog);
};
"""
"""Gives the first model of the catalog what the embedded one does not have."""


def test_what_some_models_have_is_asked_for_and_comes_back_with_the_settings(
    tab: Tab, client: httpx2.Client
) -> None:
    optional = """["embeddings", "image-prompts", "controls", "reference-images"].map((id) => {
      return $(id).closest("[hidden]") !== null;
    })"""
    assert tab.run(f"return {optional}") == [True] * 4
    tab.open(str(client.base_url), MORE)
    hidden, most, names, *sent = tab.run(
        f"""
        {READY}
        const hidden = {optional};
        const sent = [];
        window.fetch = async (_, {{ body }}) => {{ sent.push(body); throw new Error("kept"); }};
        const buttons = (id) => [...$(id).querySelectorAll("button:not([hidden])")];
        let names;
        const most = ["image-prompts", "controls", "reference-images", "adapters"].map((id) => {{
          while (buttons(id).at(-1).textContent.startsWith("Add")) buttons(id).at(-1).click();
          const rows = [...$(id).querySelectorAll("fieldset")];
          if (id === "adapters") names = rows.map((row) => row.querySelector("select").value);
          for (const row of rows) row.lastChild.click();
          return rows.length;
        }});
        const canvas = Object.assign(document.createElement("canvas"), {{ width: 8, height: 8 }});
        canvas.getContext("2d").fillRect(0, 0, 8, 8);
        const square = await new Promise((resolve) => canvas.toBlob(resolve));
        const add = (place) => {{
          [...place.querySelectorAll("button")].at(-1).click();
          const dataTransfer = new DataTransfer();
          dataTransfer.items.add(new File([square], "square.png", {{ type: "image/png" }}));
          const dropped = new DragEvent("drop", {{ dataTransfer, cancelable: true }});
          for (const upload of place.querySelectorAll(".upload")) upload.dispatchEvent(dropped);
          const [scale, start, end] = place.querySelectorAll("[type=number]");
          if (scale) [scale.value, start.value, end.value] = [0.5, 0.1, 0.7];
        }};
        """
        """
        form.upscaler.value = "latent";
        form.upscaler.dispatchEvent(new Event("change"));
        form.hires_scale.value = 1.5; form.hires_strength.value = 0.6;
        form.variation_strength.value = 0.2; form.variation_seed.value = 9;
        form.clip_skip.value = 2;
        form.prompt_syntax.value = "automatic1111";
        form.noise_width.value = 64; form.noise_height.value = 96;
        buttons("adapters").at(-1).click();
        $("adapters").querySelector("select").value = "ink";
        $("adapters").querySelector("input").value = -0.5;
        form.negative_prompt.dispatchEvent(new FocusEvent("focus"));
        $("embeddings").querySelector("button").click();
        add($("image-prompts")); add($("controls"));
        $("image-prompts").querySelector("select").value = "plus";
        add($("reference-images"));
        await until(() => document.querySelectorAll(".entries img[src]").length === 4);
        await press();

        const { open } = await import("/page/generate.js");
        const settings = { ...JSON.parse(sent[0]), width: 96, height: 160, steps: 20 };
        settings.controls[0].preprocessor = "invert";
        const run = { upscaler: "latent", strength: 0.6, steps: 20 };
        for (const [width, height] of [[128, 224], [128, 128]]) {
          await open({ ...settings, hires: { ...run, width, height } });
          await press();
        }
        const [shown] = settings.image_prompts;
        const image = [shown.image, shown.mask];
        await open({ ...settings, image_prompts: [{ ...shown, image }] });
        await press();
        return [hidden, most, names, ...sent];
        """
    )
    assert hidden == [False] * 4
    assert most == [MAX_IMAGE_PROMPTS, MAX_CONTROLS, 1, MAX_ADAPTERS]
    # A new one differs from those already there, while another is left.
    assert names == ["pastel", "ink", *["pastel"] * (MAX_ADAPTERS - 2)]
    first, again, square, several = map(json.loads, sent)
    GenerateRequest.model_validate(first)
    shown = {"scale": 0.5, "start": 0.1, "end": 0.7}
    for field, name in (("image_prompts", "plus"), ("controls", "canny")):
        image = first[field][0]["image"]
        assert image.startswith("data:image/png;base64,")
        masked = {"mask": image} if field == "image_prompts" else {}
        assert first[field] == [{"name": name, "image": image, **masked, **shown}]
    assert first["reference_images"] == [first["controls"][0]["image"]]
    assert first["hires"] == {"upscaler": "latent", "scale": 1.5, "strength": 0.6}
    assert first["variation"] == {"seed": 9, "strength": 0.2}
    assert first["noise_size"] == {"width": 64, "height": 96}
    assert first["adapters"] == [{"name": "ink", "weight": -0.5}]
    assert first["clip_skip"] == 2
    assert first["prompt_syntax"] == "automatic1111"
    assert first["negative_prompt"] == "inkstyle"

    size = {"width": 96, "height": 160, "steps": 20}
    # In multiples of 32 pixels, that scale gives 128 x 224, as 1.5 does.
    larger = {"hires": first["hires"] | {"scale": 1.4}}
    inverted = {"controls": [first["controls"][0] | {"preprocessor": "invert"}]}
    assert again == first | size | larger | inverted
    assert square["hires"] == {"upscaler": "latent", "strength": 0.6, "width": 128, "height": 128}
    [shown] = first["image_prompts"]
    assert several["image_prompts"] == [shown | {"image": [shown["image"]] * 2}]


def test_a_picture_of_several_is_drawn_again_from_its_settings(tab: Tab) -> None:
    drawn, again, start = tab.run(
        """
        form.width.value = form.height.value = 64; form.seed.value = 5; form.n.value = 2;
        form.upscaler.value = "lanczos"; form.variation_strength.value = 0.5;
        await press();
        await until(async () => (await kept()).length === 2);
        const drawn = await pictures();
        tiles()[1].click();
        act("Use settings");
        await until(() => form.variation_seed.value);
        await press();
        await until(async () => (await kept()).length === 3);
        const again = (await pictures()).at(-1);
        act("Start from it");
        await until(() => form.querySelector(".mask img").naturalWidth === 128);
        return [drawn, again, [form.upscaler.value, form.width.value]];
        """
    )
    assert drawn[0] != drawn[1]
    assert again == drawn[1]
    assert start == ["", "128"]


@pytest.mark.usefixtures("slow_denoiser")
def test_several_requests_run_at_once_and_each_is_cancelled_alone(
    tab: Tab, running: Running
) -> None:
    got = tab.run(
        """
        let asked = 0;
        const send = window.fetch;
        window.fetch = (...given) => {
          asked += given[0].toString().includes("/v1/generate");
          return send(...given);
        };
        form.steps.value = 200;
        for (let n = 0; n < 7; n += 1) form.requestSubmit();
        await until(() => tiles(".running").some(({ ariaLabel }) => ariaLabel.includes("step ")));
        const begun = [tiles(".running").length, asked];
        const stops = () => [...document.querySelectorAll("#pictures .stop")];
        stops().at(-1).click();
        await until(() => tiles().length === 6);
        const said = $("said").textContent;
        for (const stop of stops()) stop.click();
        await until(() => !tiles().length);
        return [...begun, said, $("said").className];
        """
    )
    running.settle()
    # Two wait in the page, not yet sent.
    assert got == [7, 5, "Cancelled.", ""]


def test_a_part_painted_with_the_keyboard_is_the_mask_of_the_request(tab: Tab) -> None:
    sent = tab.run(
        """
        form.width.value = form.height.value = "";
        form.seed.value = 5;
        await press();
        act("Start from it");
        const canvas = document.querySelector(".mask canvas");
        await until(() => !document.querySelector(".mask").hidden && canvas.width === 512);
        canvas.focus();
        for (const key of [" ", "ArrowLeft", "ArrowLeft"]) {
          canvas.dispatchEvent(new KeyboardEvent("keydown", { key }));
        }
        form.strength.value = 1; form.mask_content.value = "latent_noise";
        await press();
        await until(async () => (await kept()).length === 2);
        const { image, mask, strength, mask_content } = (await kept()).at(-1).request;
        return { image, mask, strength, mask_content, said: $("said").className };
        """
    )
    assert sent["said"] == ""
    assert sent["strength"] == 1
    assert sent["mask_content"] == "latent_noise"
    assert sent["image"].startswith("data:image/png;base64,")
    mask = Image.open(io.BytesIO(base64.b64decode(sent["mask"].split(",")[1]))).convert("L")
    assert mask.size == (512, 512)
    assert [mask.getpixel(at) for at in ((250, 256), (10, 10))] == [255, 0]


def test_a_grid_compares_two_parameters_on_one_seed_and_is_saved_as_one_picture(
    tab: Tab, generate: Callable[..., httpx2.Response]
) -> None:
    got = tab.run(
        """
        form.width.value = form.height.value = "";
        form.prompt.value = "a red circle"; form.seed.value = 5;
        $("compare-tab").click();
        const axes = $("compare-form");
        await until(() => axes.across.options.length);
        const along = (side, name, values) => {
          axes[side].value = name;
          axes[side].dispatchEvent(new Event("change"));
          axes[`${side}_values`].value = values;
        };
        along("across", "sampler", "ddim, deis");
        along("down", "guidance.scale", "1, 4");
        axes.requestSubmit();
        await until(() => !$("compare-save").disabled);
        const cells = [...document.querySelectorAll("#grid td button")];
        const labels = cells.map(({ ariaLabel }) => ariaLabel.split(":")[0]);
        const [image] = cells[3].children;
        const saved = await (await import("/page/compare.js")).save();
        const { width, height } = await createImageBitmap(saved);
        cells[3].click();
        await until(() => select("samplers").value === "deis");
        const seed = form.seed.value;
        return { labels, last: image.src.split(",")[1], size: [width, height], seed };
        """
    )
    assert got["labels"] == [
        f"sampler {sampler}, guidance.scale {scale}"
        for scale in (1, 4)
        for sampler in ("ddim", "deis")
    ]
    guidance = {"name": "apg", "scale": 4}
    answer = generate(sampler="deis", guidance=guidance, width=None, height=None)
    [made] = answer.json()["images"]
    assert got["last"] == made["b64_json"]
    width, height = got["size"]
    assert width > 2 * 256
    assert height > 2 * 256
    assert got["seed"] == "5"


@pytest.mark.usefixtures("slow_denoiser")
def test_the_rows_of_a_request_are_shown_as_they_are_woven(tab: Tab, running: Running) -> None:
    got = tab.run(
        """
        form.steps.value = 200;
        form.requestSubmit();
        $("rows-tab").click();
        await until(() => document.querySelectorAll("#weft .pass").length > 1);
        const cells = [...$("weft").lastChild.querySelectorAll(".cell")];
        const got = [cells.map(({ dataset }) => dataset.branch), texts("#threads li")];
        $("images-tab").click();
        document.querySelector("#pictures .stop").click();
        await ended();
        return got;
        """
    )
    running.settle()
    branches, threads = got
    assert branches == ["prompt", "negative"]
    assert len(threads) == 1
    assert "of 200, apg, always, 2 rows" in threads[0]
