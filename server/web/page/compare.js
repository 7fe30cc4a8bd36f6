/** The tab Compare: a grid of pictures of one seed, with two parameters as its axes. */

import { axesOf, valuesOf, withValues } from "./axes.js";
import { create } from "./fields.js";
import { asked, open } from "./generate.js";
import { generation } from "./generation.js";
import { gridPng } from "./grid_png.js";

const MOST_CELLS = 64;
const SEEDS = 2 ** 32;
const SIDES = { across: "steps", down: "sampler" };

const $ = (id) => document.getElementById(id);
const form = $("compare-form");
let axes = [];
let grid = null;
let running = null;

function say(text, isError = false) {
  $("compare-said").textContent = text;
  $("compare-said").className = isError ? "error" : "";
}

const chosen = (side) => axes.find(({ name }) => name === form[side].value);

function suggest(side) {
  const { suggested, words } = chosen(side);
  form[`${side}_values`].value = suggested;
  $(`${side}-words`).textContent = words;
}

/** Offers the parameters of what the tab Create asks for now. */
async function offer() {
  axes = axesOf(await asked());
  for (const [side, first] of Object.entries(SIDES)) {
    const before = form[side].value;
    form[side].replaceChildren(...axes.map(({ name }) => new Option(name)));
    form[side].value = chosen(side) && before ? before : first;
    if (form[side].value === "") form[side].value = first;
    if (form[side].value !== before) suggest(side);
  }
}

/** Draws one cell's picture as it comes. */
async function fill(cell, request, signal) {
  const { image, words } = cell;
  const events = generation(request, signal, (before) => { words.textContent = `${before + 1} in line`; });
  for await (const [name, data] of events) {
    if (name === "queued") words.textContent = "waiting for the model";
    if (data.queue_position) words.textContent = `${data.queue_position + 1} in line`;
    if (name === "progress") {
      words.textContent = `step ${data.step} of ${data.steps}`;
      if (data.preview) Object.assign(image, { src: data.preview, hidden: false });
    }
    if (name === "completed") {
      const { b64_json, url } = data.images[0];
      Object.assign(image, { src: url ?? `data:image/${data.settings.output_format};base64,${b64_json}`, hidden: false });
      cell.isDone = true;
      words.textContent = `${data.evaluations.spent} evaluations`;
      words.title = [...data.notes, ...data.warnings].join(" ");
    }
  }
}

function cellOf(request, label) {
  const image = create("img", { alt: label, hidden: true });
  const words = create("small", {}, "waiting");
  const button = create("button", { type: "button", title: "Open these settings", ariaLabel: `${label}: open these settings` }, image);
  button.addEventListener("click", () => open(request));
  return { image, words, element: create("td", {}, button, words), request, isDone: false };
}

/** A table of cells for pairs of values. */
function tableOf(request, across, down, catalog) {
  const cells = down.values.map((low) => across.values.map((high) => {
    const made = withValues(request, [[across.name, high], [down.name, low]], catalog);
    return cellOf(made, `${across.name} ${high}, ${down.name} ${low}`);
  }));
  const heads = across.values.map((value) => create("th", { scope: "col" }, create("small", {}, across.name), value));
  const rows = cells.map((row, index) => {
    const head = create("th", { scope: "row" }, create("small", {}, down.name), down.values[index]);
    return create("tr", {}, head, ...row.map(({ element }) => element));
  });
  const title = `${request.prompt} (seed ${request.seed})`;
  const table = create("table", {}, create("caption", {}, title), create("thead", {}, create("tr", {}, create("td"), ...heads)), create("tbody", {}, ...rows));
  return { title, table, across, down, cells };
}

function sidesOf() {
  const [across, down] = Object.keys(SIDES).map((side) => ({ name: form[side].value, values: valuesOf(form[`${side}_values`].value) }));
  const count = across.values.length * down.values.length;
  if (across.name === down.name) throw new Error("Across and down are the same parameter; choose two.");
  if (count > MOST_CELLS) throw new Error(`These are ${count} pictures; a grid has at most ${MOST_CELLS}.`);
  return [across, down];
}

async function compare() {
  const [across, down] = sidesOf();
  const { request, catalog } = await asked();
  const seeded = { ...request, seed: request.seed ?? Math.floor(Math.random() * SEEDS), n: 1 };
  grid = tableOf(seeded, across, down, catalog);
  $("grid").replaceChildren(grid.table);
  running = new AbortController();
  $("compare-stop").disabled = false;
  const { signal } = running;
  const errors = new Set();
  await Promise.all(grid.cells.flat().map(async (cell) => {
    try {
      await fill(cell, cell.request, signal);
    } catch (error) {
      cell.words.textContent = signal.aborted ? "cancelled" : error.message;
      if (!signal.aborted) errors.add(error.message);
    }
  }));
  const done = grid.cells.flat().filter(({ isDone }) => isDone).length;
  say(`${done} of ${grid.cells.flat().length} pictures.`, errors.size > 0);
}

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  running?.abort();
  say("");
  $("compare-save").disabled = true;
  try {
    await compare();
    $("compare-save").disabled = false;
  } catch (error) {
    say(error.message, true);
  } finally {
    $("compare-stop").disabled = true;
  }
});

$("compare-stop").addEventListener("click", () => running.abort());

/** The grid as a file. */
export const save = () =>
  gridPng({ ...grid, images: grid.cells.map((row) => row.map(({ image, isDone }) => (isDone ? image : null))) });

$("compare-save").addEventListener("click", async () => {
  const href = URL.createObjectURL(await save());
  create("a", { href, download: "weft-grid.png" }).click();
  setTimeout(() => URL.revokeObjectURL(href), 1000);
});

for (const side of Object.keys(SIDES)) form[side].addEventListener("change", () => suggest(side));

const offerOrSay = () => offer().catch((error) => say(error.message, true));
$("compare-panel").addEventListener("open", offerOrSay);
if (!$("compare-panel").hidden) offerOrSay();
