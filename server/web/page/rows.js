/** The tab Rows: the rows of the engine's forward passes, as they are woven. */

import { create } from "./fields.js";
import { asked } from "./generate.js";
import { generation } from "./generation.js";
import { answered, events, headers, loaded } from "./server.js";

const PASSES = 48;
const DENSE = 24;
const GOLDEN_ANGLE = 137.5;
const AGAIN_MS = 2000;

const $ = (id) => document.getElementById(id);
const panel = $("rows-panel");
let watching = null;

function say(text, isError = false) {
  $("rows-said").textContent = text;
  $("rows-said").className = isError ? "error" : "";
}

/** An element in the color of a request. */
function colored(request, tag, properties, ...children) {
  const element = create(tag, properties, ...children);
  element.style.setProperty("--hue", (request * GOLDEN_ANGLE) % 360);
  return element;
}

const inOrder = (images) => images.toSorted((one, other) => one.request - other.request || one.image - other.image);

function cellsOf({ request, timestep, branches, step, steps, rule }) {
  return branches.map((branch) => {
    const title = `request ${request}, ${branch}, timestep ${Math.round(timestep)}, step ${step} of ${steps}, ${rule}`;
    const cell = colored(request, "span", { className: "cell", title }, String(Math.round(timestep)));
    cell.dataset.branch = branch;
    return cell;
  });
}

/** Adds a forward pass at the right, and lists the requests that are in it. */
function draw({ tick, seconds, waiting, model, images }) {
  const ordered = inOrder(images);
  const cells = ordered.flatMap(cellsOf);
  const weft = $("weft");
  weft.append(create("div", { className: "pass", title: `forward pass ${tick} of ${model}` }, ...cells, create("small", {}, `${Math.round(1000 * seconds)} ms`)));
  while (weft.children.length > PASSES) weft.firstChild.remove();
  weft.classList.toggle("dense", [...weft.children].some(({ children }) => children.length > DENSE));
  const requests = new Set(images.map(({ request }) => request)).size;
  const told = `${cells.length} rows of ${requests} ${requests === 1 ? "request" : "requests"} in one forward pass of ${model}`;
  weft.ariaLabel = told;
  say(`${told}${waiting ? `; ${waiting} ${waiting === 1 ? "image waits" : "images wait"}` : ""}.`);
  $("threads").replaceChildren(...ordered.map(({ request, image, step, steps, rule, policy, branches, live }) => {
    const swatch = colored(request, "span", { className: "cell" }, `${request}`);
    const name = live ? "a live frame" : `image ${image + 1}`;
    const rows = branches.length === 1 ? "1 row" : `${branches.length} rows`;
    return create("li", {}, swatch, `${name}: step ${step} of ${steps}, ${rule}, ${policy}, ${rows}`);
  }));
}

const pause = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

/** Watches until the tab closes; the server ends a stream after a while, and is then asked again. */
async function watch(signal) {
  await loaded(say);
  while (!signal.aborted) {
    const response = await answered(await fetch("/v1/rows", { headers: headers(), signal }));
    say("Watching; no forward pass runs now.");
    for await (const [name, data] of events(response)) if (name === "tick") draw(data);
    await pause(AGAIN_MS);
  }
}

function open() {
  watching = new AbortController();
  const { signal } = watching;
  watch(signal).catch((error) => signal.aborted || say(error.message, true));
}

const close = () => watching?.abort();

panel.addEventListener("open", open);
panel.addEventListener("close", close);
document.addEventListener("visibilitychange", () => {
  if (panel.hidden) return;
  if (document.hidden) close();
  else open();
});
if (!panel.hidden) open();

/** Four requests that have little in common, of the prompt on the tab Create. */
function unlike({ request, catalog }) {
  const { prompt, model } = request;
  const named = (entries, at) => ({ name: entries.at(at).name });
  const { samplers, rules } = catalog;
  return [
    { prompt, model, steps: 40 },
    { prompt, model, steps: 60, sampler: named(samplers, 0), guidance: named(rules, 0) },
    { prompt, model, steps: 25, sampler: named(samplers, 1), n: 2 },
    { prompt, model, steps: 50, guidance: named(rules, 1), negative_prompt: "a square" },
  ];
}

async function finish(request) {
  // Its pictures are not what this tab shows.
  for await (const _ of generation(request, new AbortController().signal, () => {}));
}

$("weave").addEventListener("click", async () => {
  $("weave").disabled = true;
  try {
    await Promise.all(unlike(await asked()).map(finish));
  } catch (error) {
    say(error.message, true);
  } finally {
    $("weave").disabled = false;
  }
});
