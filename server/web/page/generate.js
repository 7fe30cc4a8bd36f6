/** The tab for single images. */

import { pickersOf } from "./catalog.js";
import { create } from "./fields.js";
import { answered, events, headers, loaded, needsKey } from "./server.js";

const $ = (id) => document.getElementById(id);
const form = $("form");
let pickers;

function say(text, isError = false) {
  $("said").textContent = text;
  $("said").className = isError ? "error" : "";
}

function body() {
  const made = { prompt: form.prompt.value, model: form.model.value };
  if (form.negative_prompt.value) made.negative_prompt = form.negative_prompt.value;
  for (const name of ["steps", "n", "seed"]) if (form[name].value) made[name] = Number(form[name].value);
  return pickers.fill(made);
}

/** The equivalent command; it saves a single image as a file, and several as JSON. */
function curl(asked) {
  const answer = asked.n > 1 ? "-o out.json" : "-H 'accept: image/png' -o out.png";
  const key = needsKey() ? "-H 'authorization: Bearer KEY' " : "";
  const text = JSON.stringify(asked).replaceAll("'", "'\\''");
  return `curl ${location.origin}/v1/generate -H 'content-type: application/json' ${key}${answer} -d '${text}'`;
}

async function generate(asked) {
  const response = await answered(await fetch("/v1/generate", {
    method: "POST",
    headers: { "content-type": "application/json", ...headers() },
    body: JSON.stringify({ ...asked, stream: true }),
  }));
  const shares = {};
  let figures = [];
  for await (const [name, data] of events(response)) {
    if (name === "error") throw new Error(data.error.message);
    if (name === "queued") {
      const { n, seed, prompt } = data.settings;
      $("curl").textContent = curl({ ...asked, seed });
      figures = Array.from({ length: n }, () => create("figure", {}, create("img", { alt: prompt }), create("figcaption", {}, "waiting")));
      $("pictures").replaceChildren(...figures);
      $("answer").scrollIntoView({ block: "nearest" });
    }
    if (name === "progress") {
      const { index, step, steps, preview } = data;
      const [image, caption] = figures[index].children;
      caption.textContent = `step ${step} of ${steps}`;
      if (preview) image.src = preview;
      shares[index] = step / steps / figures.length;
      $("progress").value = Object.values(shares).reduce((sum, share) => sum + share);
    }
    if (name === "completed") {
      data.images.forEach(({ b64_json, seed }, index) => {
        const [image, caption] = figures[index].children;
        const ancestor = data.particles && `, from image ${data.particles.ancestors[index] + 1}`;
        image.src = `data:image/png;base64,${b64_json}`;
        caption.textContent = `seed ${seed}${ancestor ?? ""}`;
      });
      const { spent, saved } = data.evaluations;
      const cost = `${spent} evaluations, ${saved} saved, ${data.timings.total_s.toFixed(2)} s.`;
      return say([cost, ...data.notes, ...data.warnings].join(" "));
    }
  }
  throw new Error("The server closed the connection before the images were complete.");
}

async function start() {
  const catalog = await loaded(say);
  const { models } = catalog;
  form.model.replaceChildren(...models.map((model) => new Option(model.name)));
  pickers = pickersOf(catalog, ({ blank }) => $(blank === "off" ? "added" : "needed"));
  const follow = () => {
    const model = models[form.model.selectedIndex];
    form.steps.placeholder = model.defaults.steps;
    form.n.placeholder = model.defaults.n;
    pickers.follow(model);
  };
  form.model.addEventListener("change", follow);
  follow();
  return true;
}

let started = false;
try { started = await start(); } catch (error) { say(error.message, true); }

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  const button = form.querySelector("button:not([type])");
  button.disabled = true;
  say("");
  try {
    started ||= await start();
    const asked = body();
    $("curl").hidden = false;
    $("curl").textContent = curl(asked);
    $("progress").value = 0;
    $("progress").hidden = false;
    await generate(asked);
  } catch (error) {
    say(error.message, true);
    $("answer").scrollIntoView({ block: "nearest" });
  } finally {
    button.disabled = false;
    $("progress").hidden = true;
  }
});
