"""The page at `/`: its text, and what it does in a browser where this machine has one."""

from __future__ import annotations

import base64
import itertools
import json
import shlex
from collections.abc import Callable, Iterator
from typing import Any

import httpx2
import pytest

from guidance import CFG
from guidance.embedded import Embedded
from samplers import LCM, LCMSpacing
from server.http.documents import WEB
from server.models.defaults import ModelDefaults
from server.requests.catalog import Catalog, catalog, defaults_of
from server.requests.schema import GenerateRequest, guidance_of
from tests.server.http.browser import Tab, new_tab

PAGE = "\n".join(
    file.read_text("utf-8") for file in (WEB / "index.html", *sorted((WEB / "page").iterdir()))
)
CHOICES = {
    choice.entries: choice.field + (".0" if choice.most > 1 else "") for choice in catalog().choices
}
"""Where the page puts what it chose from each list of the catalog."""

TOOLS = """
const form = document.forms[0];
const until = async (there) => {
  while (!there()) await new Promise((resolve) => setTimeout(resolve, 10));
};
const selects = () => [...document.querySelectorAll("#choices > div > fieldset > select")];
const titles = TITLES;
const select = (title) => selects()[titles.indexOf(title)];
const pick = (title, option) => {
  select(title).value = option;
  select(title).dispatchEvent(new Event("change", { bubbles: true }));
};
const press = async () => {
  form.requestSubmit();
  await until(() => !form.querySelector("button").disabled);
};
const texts = (selector) => [...document.querySelectorAll(selector)].map((one) => one.textContent);
const pictures = () => [...document.querySelectorAll("#answer img")].map((image) => image.src);
""".replace("TITLES", json.dumps([*CHOICES]))


@pytest.fixture
def tab(browser: str, client: httpx2.Client) -> Iterator[Tab]:
    """The server's page, ready to use."""
    with new_tab(browser, TOOLS) as tab:
        tab.open(str(client.base_url))
        tab.run(f"await until(() => selects().length === {len(CHOICES)}); form.steps.value = 2")
        yield tab


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
    legends = tab.run("return texts('#choices > div > fieldset > legend')")
    assert sorted(legends) == sorted(choice.title for choice in catalog().choices)
    assert {*CHOICES} == {*Catalog.model_fields} - {"choices", "defaults", "models"}


@pytest.mark.parametrize("title", CHOICES)
def test_the_page_spells_nothing_that_the_catalog_lists(title: str) -> None:
    names = {entry.name for entry in getattr(catalog(), title)} - set(CHOICES)
    assert not [name for name in names if f'"{name}"' in PAGE]


def test_the_page_as_it_opens_is_a_request_that_leaves_all_out(
    tab: Tab, generate: Callable[..., httpx2.Response]
) -> None:
    shown = tab.run("form.seed.value = 5; await press(); return [form.prompt.value, pictures()]")
    [picture] = generate(prompt=shown[0]).json()["images"]
    assert shown[1] == [f"data:image/png;base64,{picture['b64_json']}"]


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


def test_the_page_shows_what_has_no_effect(tab: Tab) -> None:
    said = tab.run(
        """
        form.negative_prompt.value = "a square"; pick("rules", "none");
        await press();
        return texts("#said");
        """
    )
    assert said[0].endswith(
        "negative_prompt has no effect: guidance 'none' evaluates the prompt alone."
    )


def test_the_page_shows_every_image_of_a_group(tab: Tab) -> None:
    shown = tab.run(
        """
        form.n.value = 3; form.seed.value = 5;
        pick("negtome", "negtome");
        await press();
        return { pictures: pictures(), captions: texts("figcaption") };
        """
    )
    assert len(set(shown["pictures"])) == 3
    assert all(picture.startswith("data:image/png;base64,") for picture in shown["pictures"])
    assert shown["captions"] == ["seed 5", "seed 6", "seed 7"]


def test_the_page_shows_why_a_request_is_refused(tab: Tab) -> None:
    said = tab.run('pick("particles", "fkc"); await press(); return texts("#said, .error")')
    assert said == ["n is 1; guidance.particles needs at least 2 images."]


def test_the_page_aims_at_what_the_model_s_classifier_knows(
    tab: Tab, client: httpx2.Client
) -> None:
    model = client.get("/v1/catalog").json()["models"][0]
    shown = tab.run(
        """
        pick("classifiers", "elucd");
        const labels = document.querySelectorAll("fieldset fieldset label");
        const classes = [...labels].map((label) => {
          const aim = label.querySelector("select");
          aim.selectedIndex = aim.options.length - 1;
          return [label.firstChild.data.trim(), [...aim.options].slice(1).map(({ text }) => text)];
        });
        await press();
        return { classes, text: texts("#curl"), pictures: pictures() };
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
        "await press(); return { curl: texts('#curl')[0], pictures: pictures() }"
    )
    headers, body = _posted(shown["curl"])
    assert body["prompt"] == prompt
    answer = client.post("/v1/generate", json=body, headers=headers)
    assert answer.headers["content-type"] == kind
    if n > 1:
        made = [image["b64_json"] for image in answer.json()["images"]]
    else:
        made = [base64.b64encode(answer.content).decode()]
    assert shown["pictures"] == [f"data:image/png;base64,{picture}" for picture in made]


def _posted(command: str) -> tuple[dict[str, str], Any]:
    """Headers and body of a curl command, as a shell reads it."""
    words = shlex.split(command)
    options = list(itertools.pairwise(words))
    headers = dict(word.split(": ", 1) for option, word in options if option == "-H")
    return headers, json.loads(next(word for option, word in options if option == "-d"))
