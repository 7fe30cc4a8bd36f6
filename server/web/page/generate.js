/** The tab Create: asks for pictures, shows them as they come, and takes settings back. */

import { examplesOf } from "./examples.js";
import { create } from "./fields.js";
import * as gallery from "./gallery.js";
import { generation } from "./generation.js";
import { settingsIn } from "./png_text.js";
import { PRESETS } from "./presets.js";
import { requestForm, segments } from "./request_form.js";
import { loaded, needsKey } from "./server.js";

const $ = (id) => document.getElementById(id);
const form = $("form");
let asking;
let catalog;

function say(text, isError = false) {
  $("said").textContent = text;
  $("said").className = isError ? "error" : "";
}

/**
 * The equivalent command; it saves a single image as a file, and several as JSON. The request is its
 * input, as no argument may be as long as a picture.
 */
function curl(asked) {
  const answer = asked.n > 1 ? "-o out.json" : "-H 'accept: image/png' -o out.png";
  const key = needsKey() ? "-H 'authorization: Bearer KEY' " : "";
  return `curl ${location.origin}/v1/generate -H 'content-type: application/json' ${key}${answer} -d @- <<'END'\n${JSON.stringify(asked)}\nEND`;
}

const blobOf = (base64, type) => new Blob([Uint8Array.from(atob(base64), (one) => one.charCodeAt(0))], { type });

const waiting = (before) => ({ caption: `waiting, ${before + 1} in line` });

const UPLOADS = ["image", "mask", "reference", "reference_images", "image_prompts", "controls"];

/** The request for one image of an answer alone, if it does not depend on the others. */
function requestOf(asked, { settings, particles }, seed, index) {
  const isAlone = !particles && !settings.guidance.negtome;
  const uploads = Object.fromEntries(UPLOADS.filter((name) => asked[name]).map((name) => [name, asked[name]]));
  const { variation } = settings;
  const own = { seed, n: 1, ...(variation && { variation: { ...variation, seed: variation.seed + index } }) };
  return { ...settings, ...(isAlone && own), ...uploads };
}

async function generate(asked) {
  const controller = new AbortController();
  const pictures = gallery.begin(asked.prompt, asked.n ?? asking.model().defaults.n, () => controller.abort());
  const all = (changes) => pictures.forEach((picture) => gallery.tell(picture, changes));
  let command = curl(asked);
  all({ command });
  try {
    for await (const [name, data] of generation(asked, controller.signal, (before) => all(waiting(before)))) {
      if (name === "queued") {
        command = curl({ ...asked, seed: data.settings.seed });
        all({ command, caption: "waiting for the model" });
      }
      if (data.queue_position) all(waiting(data.queue_position));
      if (name === "progress") {
        const { index, step, steps, preview } = data;
        gallery.tell(pictures[index], { caption: `step ${step} of ${steps}`, share: step / steps, ...(preview && { src: preview }) });
      }
      if (name === "completed") {
        const kind = `image/${data.settings.output_format}`;
        const { spent, saved } = data.evaluations;
        const cost = `${spent} evaluations, ${saved} saved, ${data.timings.total_s.toFixed(2)} s.`;
        say([cost, ...data.notes, ...data.warnings].join(" "));
        await Promise.all(data.images.map(async ({ b64_json, url, seed }, index) => {
          const blob = url ? await (await fetch(url)).blob() : blobOf(b64_json, kind);
          const ancestor = data.particles ? `, from image ${data.particles.ancestors[index] + 1}` : "";
          return gallery.finish(pictures[index], blob, `seed ${seed}${ancestor}`, requestOf(asked, data, seed, index));
        }));
      }
    }
  } catch (error) {
    gallery.drop(pictures);
    say(controller.signal.aborted ? "Cancelled." : error.message, !controller.signal.aborted);
  }
}

const asPng = async (blob) => {
  if (blob.type === "image/png") return blob;
  const bitmap = await createImageBitmap(blob);
  const canvas = create("canvas", { width: bitmap.width, height: bitmap.height });
  canvas.getContext("2d").drawImage(bitmap, 0, 0);
  return new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
};

const asDataUri = (blob) => new Promise((resolve) => {
  const reader = new FileReader();
  reader.onload = () => resolve(reader.result);
  reader.readAsDataURL(blob);
});

async function showSettings(request) {
  await asking.show(request);
  tellPreset(null);
  const isHosted = catalog.models.some(({ name }) => name === request.model);
  if (!isHosted) say(`Model ${request.model} is not loaded here; the chosen one stays.`, true);
  else if (request.strength && !request.image) say("These settings start from a picture; choose it under Start from a picture.");
  else if (typeof request.reference_images === "number") say("The prompt of these settings is about pictures; choose them under Pictures to edit.");
  else if ([...request.image_prompts ?? [], ...request.controls ?? []].some(({ image }) => !image)) say("These settings have pictures beside the prompt; choose them under Image prompts and ControlNets.");
  else say("The settings of the picture are back.");
}

/** What may be done with the picture that is shown large. */
const ACTIONS = {
  "Use settings": ({ request }) => showSettings(request),
  "Reuse seed": ({ request }) => {
    form.seed.value = request.seed;
    say(`The next picture has seed ${request.seed}.`);
  },
  "Start from it": async ({ blob, request }) => {
    const { width, height } = request.hires ?? request;
    Object.assign(form.width, { value: width });
    Object.assign(form.height, { value: height });
    asking.startFrom(await asDataUri(blob));
    const details = $("image-upload").closest("details");
    details.open = true;
    details.scrollIntoView({ block: "nearest" });
  },
  Copy: async ({ blob }) => {
    if (!navigator.clipboard) throw new Error("Browsers copy pictures only on pages of HTTPS or of this machine.");
    await navigator.clipboard.write([new ClipboardItem({ "image/png": asPng(blob) })]);
    say("Copied.");
  },
  Download: ({ blob, src, request }) => create("a", { href: src, download: `weft-${request.seed}.${blob.type.split("/")[1]}` }).click(),
  Delete: (picture) => gallery.discard(picture),
};

for (const [textContent, act] of Object.entries(ACTIONS)) {
  const onclick = async () => {
    try { await act(gallery.current()); } catch (error) { say(error.message, true); }
  };
  $("actions").append(create("button", { type: "button", textContent, onclick }));
}

gallery.whenShown((picture) => {
  $("actions").hidden = !picture?.isDone;
  const command = picture?.command ?? (picture?.request && !picture.request.image && curl(picture.request));
  $("about").hidden = !command;
  $("curl").textContent = command || "";
});

function tellPreset(name) {
  for (const radio of $("presets").querySelectorAll("input")) radio.checked = radio.value === name;
  const preset = PRESETS.find((one) => one.name === name);
  $("preset-words").textContent = preset ? preset.words(asking.model(), catalog.models) : "Your own settings.";
}

function offerExamples() {
  const examples = examplesOf(form.model.value);
  $("examples").hidden = !examples;
  if (!examples) return;
  $("empty").textContent = `${examples.words} Press one of the examples.`;
  $("examples").replaceChildren(...examples.prompts.map((textContent) => {
    const onclick = () => {
      form.prompt.value = textContent;
      form.requestSubmit();
    };
    return create("button", { type: "button", textContent, onclick });
  }));
}

async function start() {
  catalog = await loaded(say);
  asking = requestForm(form, catalog);
  const opening = asking.model().defaults.convention === null ? "balanced" : "fast";
  $("presets").disabled = false;
  tellPreset(opening);
  offerExamples();
  form.model.addEventListener("change", offerExamples);
  $("more").addEventListener("change", () => tellPreset(null));
  return true;
}

/** Loads the catalog, unless it is loaded. */
async function ready() {
  started ||= await start();
}

/** What the form asks for now, and the catalog; throws a sentence if the server or the form has none. */
export async function asked() {
  await ready();
  return { request: asking.read(), catalog };
}

/** Shows a request in the form, on its tab. */
export async function open(request) {
  $("images-tab").click();
  await showSettings(request);
}

let started = false;
// They are there from the beginning, and can be pressed once it is known what they ask for.
segments($("presets"), PRESETS, (name) => {
  asking.choose(PRESETS.find((one) => one.name === name).fields(asking.model(), catalog.models));
  tellPreset(name);
  offerExamples();
});
await gallery.restore();
try { await ready(); } catch (error) { say(error.message, true); }

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  say("");
  try {
    if (!started) await ready();
    await generate(asking.read());
  } catch (error) {
    say(error.message, true);
  }
});

form.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
});

window.addEventListener("dragover", (event) => event.preventDefault());
window.addEventListener("drop", async (event) => {
  const [file] = event.dataTransfer.files;
  if (!file) return;
  event.preventDefault();
  const request = started && (await settingsIn(file));
  if (request) await showSettings(request);
  else say(`${file.name} is not a PNG with settings of this server.`, true);
});
