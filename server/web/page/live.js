/** The tab for live streams: frames of a drawing or the webcam in, images out. */

import { pickersOf } from "./catalog.js";
import { drawOn } from "./drawing.js";
import { LiveStream } from "./live_stream.js";
import { imagePromptFields } from "./picture_fields.js";
import { referenceFields } from "./reference_fields.js";
import { answered, headers, loaded, typedKey } from "./server.js";
import { turnOnWebcam } from "./webcam.js";

/** Of models that are not made for few steps. */
const LIVE_STEPS = 8;

const JPEG_QUALITY = 0.9;

const $ = (id) => document.getElementById(id);
const form = $("live-form");
const canvas = $("drawing");
const frame = document.createElement("canvas");
const imagePrompts = imagePromptFields($("live-image-prompts"));
const references = referenceFields($("live-reference-images"));
let pickers;
let models;
let view = canvas;
let turnOff = () => {};
let stream = null;
let isPaused = false;
let isFresh = true;
let isEncoding = false;
let hasFailed = false;
let timer;

function say(text, isError = false) {
  $("live-said").textContent = text;
  $("live-said").className = isError ? "error" : "";
}

const chosenModel = () => models[form.model.selectedIndex];

function settings() {
  const made = {
    prompt: form.prompt.value,
    model: form.model.value,
    source: form.frames_as.value,
    paused: isPaused,
  };
  // A run that starts from a frame has a share of the steps.
  if (made.source === "frames") made.strength = Number(form.strength.value);
  for (const name of ["steps", "seed"]) if (form[name].value) made[name] = Number(form[name].value);
  references.fill(made);
  imagePrompts.fill(made);
  // One that is just being added has no picture yet.
  made.image_prompts &&= made.image_prompts.filter(({ image }) => image);
  return pickers.fill(made);
}

/** Draws the middle of what is shown, at the size and proportions of the model's images. */
function takeFrame() {
  const { width, height } = chosenModel();
  Object.assign(frame, { width, height });
  const [from, to] = [[view.videoWidth ?? view.width, view.videoHeight ?? view.height], [width, height]];
  const scale = Math.max(to[0] / from[0], to[1] / from[1]);
  const size = from.map((one) => one * scale);
  const corner = size.map((one, axis) => (to[axis] - one) / 2);
  frame.getContext("2d").drawImage(view, ...corner, ...size);
  return new Promise((resolve) => frame.toBlob(resolve, "image/jpeg", JPEG_QUALITY));
}

/** Sends what is shown, unless the server has it already or has enough to do; then later. */
async function offer() {
  clearTimeout(timer);
  const delay = stream?.delay ?? null;
  if (delay === null || isPaused || !isFresh || isEncoding) return;
  if (delay > 0) {
    timer = setTimeout(offer, delay);
    return;
  }
  const to = stream;
  isFresh = false;
  isEncoding = true;
  const blob = await takeFrame();
  isEncoding = false;
  if (stream === to) to.send(blob);
  offer();
}

function refresh() {
  isFresh = true;
  offer();
}

const heard = {
  settings({ warnings, notes, stages, settings: { seed } }) {
    hasFailed = false;
    form.seed.placeholder = seed;
    say([`Live, ${stages} ${stages === 1 ? "evaluation" : "evaluations"} a frame.`, ...notes, ...warnings].join(" "));
    refresh();
  },
  picture(blob, { fps, latency, dropped }) {
    const before = $("live-picture").src;
    $("live-picture").src = URL.createObjectURL(blob);
    URL.revokeObjectURL(before);
    $("live-fps").textContent = fps === null ? "–" : fps.toFixed(1);
    $("live-latency").textContent = `${Math.round(latency)} ms`;
    $("live-dropped").textContent = dropped;
    offer();
  },
  error(sentence, isHeld) {
    hasFailed = true;
    say(isHeld ? `${sentence} The stream waits until its settings change.` : sentence, true);
    offer();
  },
  async closed(wasOpen, isExpected) {
    show(null);
    if (isExpected) say("Stopped.");
    else if (!wasOpen) say(await whyRefused(), true);
    else if (!hasFailed) say("The connection to the server was lost.", true);
  },
};

/** A socket does not tell a page why it was refused, but other routes refuse for the same reasons. */
async function whyRefused() {
  try {
    await answered(await fetch("/readyz"));
    await answered(await fetch("/v1/catalog", { headers: headers() }));
  } catch (error) {
    return error instanceof TypeError ? "The server cannot be reached." : error.message;
  }
  return "As many live streams are open as the server allows; try again later.";
}

/** Lets the buttons tell whether a stream is open, and paused. */
function show(opened) {
  stream = opened;
  isPaused &&= opened !== null;
  $("live-start").textContent = opened ? "Stop" : "Start";
  $("live-pause").disabled = !opened;
  $("live-pause").ariaPressed = isPaused;
}

async function start() {
  const catalog = await loaded(say);
  models = catalog.models;
  form.model.replaceChildren(...models.map((model) => new Option(model.name)));
  const fewest = Math.min(...models.map((model) => model.defaults.steps));
  form.model.selectedIndex = models.findIndex((model) => model.defaults.steps === fewest);
  pickers = pickersOf(catalog, ({ blank }) => (blank === "off" ? null : $("live-choices")));
  const follow = () => {
    const { steps } = chosenModel().defaults;
    form.steps.placeholder = steps;
    form.steps.value = steps > LIVE_STEPS ? LIVE_STEPS : "";
    pickers.follow(chosenModel());
    references.offer(chosenModel());
    imagePrompts.offer(chosenModel());
    const edits = chosenModel().reference_images > 0;
    form.frames_as.closest("label").hidden = !edits;
    if (!edits) form.frames_as.value = "frames";
  };
  form.model.addEventListener("change", follow);
  follow();
  return true;
}

let started = null;

/** Loads the catalog once; if that fails, the next call tries again. */
function ready() {
  started ??= start().catch((error) => {
    started = null;
    throw error;
  });
  return started;
}

$("live-panel").addEventListener("open", () => ready().catch((error) => say(error.message, true)));

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  if (stream) {
    stream.close();
    return;
  }
  try {
    await ready();
  } catch (error) {
    say(error.message, true);
    return;
  }
  hasFailed = false;
  say("Connecting …");
  show(new LiveStream(typedKey(), heard));
  stream.want(settings());
});

form.addEventListener("change", () => stream && form.reportValidity() && stream.want(settings()));
form.prompt.addEventListener("input", () => stream && form.prompt.value && stream.want(settings()));
form.strength.addEventListener("input", () => {
  $("live-strength").textContent = Number(form.strength.value).toFixed(2);
  if (stream) stream.want(settings());
});

$("live-pause").addEventListener("click", () => {
  isPaused = !isPaused;
  show(stream);
  stream.want(settings());
});

const pen = () => ({ color: $("pen-color").value, width: Number($("pen-width").value) });
const clear = drawOn(canvas, $("cursor"), pen, refresh);
$("clear").addEventListener("click", clear);

for (const choice of $("sources").querySelectorAll("input[name=source]")) {
  choice.addEventListener("change", async () => {
    const isWebcam = choice.value === "webcam";
    turnOff();
    turnOff = () => {};
    $("sheet").hidden = $("pen").hidden = isWebcam;
    $("webcam").hidden = !isWebcam;
    view = canvas;
    if (isWebcam) {
      try {
        turnOff = await turnOnWebcam($("webcam"), refresh);
        view = $("webcam");
      } catch (error) {
        say(error.message, true);
      }
    }
    refresh();
  });
}
