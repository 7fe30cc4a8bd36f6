/** The form of a request: what it asks for, and how a request is shown in it. */

import { adapterFields } from "./adapter_fields.js";
import { pickersOf } from "./catalog.js";
import { create } from "./fields.js";
import { hiresFields, sizeBeside } from "./hires.js";
import { maskPainter } from "./mask.js";
import { controlFields, imagePromptFields } from "./picture_fields.js";
import { referenceFields } from "./reference_fields.js";
import { startNoiseFields } from "./start_noise.js";
import { textFields } from "./texts.js";
import { upload } from "./upload.js";

const NUMBERS = ["width", "height", "steps", "n", "seed", "strength"];
const TEXTS = ["negative_prompt"];
const SHOWN = new Set([
  "prompt", "model", "output_format", "sampler", "spacing", "guidance", "cache", "image", "mask", "mask_content", "reference",
  "image_prompts", "controls", "reference_images", "adapters", "hires", "variation", "noise_size", "clip_skip", "prompt_syntax",
  "resize_mode", ...NUMBERS, ...TEXTS,
]);

/** What the form has no input for: unknown fields, all but the first perturbation, a size of the second run. */
function others(request, model) {
  const rest = Object.entries(request).filter(([name, value]) => !SHOWN.has(name) && value?.length !== 0);
  const perturbed = request.guidance?.perturbed;
  const hires = sizeBeside(request, model);
  return { ...Object.fromEntries(rest), ...(perturbed?.length > 1 && { guidance: { perturbed } }), ...(hires && { hires }) };
}

/** The input of a form for what a painted part starts from. */
function maskContentFields(form, names) {
  form.mask_content.replaceChildren(new Option("as the server chooses", ""), ...names.map((name) => new Option(name)));
  const fill = (request) => {
    if (request.mask && form.mask_content.value) request.mask_content = form.mask_content.value;
  };
  const show = (request) => { form.mask_content.value = request.mask_content ?? ""; };
  return { fill, show };
}

/**
 * Lets a form ask for what a catalog offers.
 *
 * @param form with the inputs of `index.html`.
 * @param catalog the server's.
 */
export function requestForm(form, catalog) {
  const { models } = catalog;
  const picture = upload("Picture", "A PNG, JPEG or WebP that the result starts from.");
  const reference = upload("Reference", "A picture to move away from; needs NegToMe, under More guidance.");
  const mask = maskPainter();
  form.querySelector("#image-upload").replaceChildren(picture);
  form.querySelector("#reference-upload").replaceChildren(reference);
  form.querySelector("#mask").replaceChildren(mask);
  form.model.replaceChildren(...models.map(({ name }) => new Option(name)));
  picture.addEventListener("change", () => {
    form.querySelector("#mask-content").hidden = !picture.read();
    mask.over(picture.read());
  });
  const hires = hiresFields(form, catalog.upscalers);
  const parts = [
    startNoiseFields(form),
    hires,
    textFields(form),
    maskContentFields(form, catalog.mask_contents),
    referenceFields(form.querySelector("#reference-images")),
    imagePromptFields(form.querySelector("#image-prompts")),
    adapterFields(form.querySelector("#adapters")),
    controlFields(form.querySelector("#controls")),
  ];

  const places = [...form.querySelectorAll("[data-choices]")];
  const placeOf = ({ entries }) =>
    places.find(({ dataset }) => dataset.choices.split(" ").includes(entries)) ?? places.at(-1);
  const pickers = pickersOf(catalog, placeOf);
  const model = () => models[form.model.selectedIndex];

  const follow = () => {
    const { defaults, width, height, size_multiple: multiple } = model();
    form.steps.placeholder = defaults.steps;
    form.n.placeholder = defaults.n;
    Object.assign(form.width, { placeholder: width, step: multiple, min: multiple });
    Object.assign(form.height, { placeholder: height, step: multiple, min: multiple });
    pickers.follow(model());
    for (const part of parts) part.offer?.(model());
  };
  form.model.addEventListener("change", follow);
  // The browser shows what is wrong with a field only where the field is seen.
  form.addEventListener("invalid", ({ target }) => { target.closest("details")?.setAttribute("open", ""); }, true);
  follow();

  /** The request that the form states; throws a sentence if a field cannot be read. */
  const read = () => {
    const made = { prompt: form.prompt.value, model: form.model.value };
    for (const name of TEXTS) if (form[name].value) made[name] = form[name].value;
    for (const name of NUMBERS) if (form[name].value) made[name] = Number(form[name].value);
    if (form.output_format.selectedIndex) made.output_format = form.output_format.value;
    if (form.resize_mode.value) made.resize_mode = form.resize_mode.value;
    for (const [name, input] of Object.entries({ image: picture, mask, reference })) {
      if (input.read()) made[name] = input.read();
    }
    for (const part of parts) part.fill(made);
    pickers.fill(made);
    if (!form.extra.value.trim()) return made;
    let extra;
    try { extra = JSON.parse(form.extra.value); } catch { extra = null; }
    if (extra === null || typeof extra !== "object") throw new Error("Other fields must be a JSON object, such as {\"priority\": \"batch\"}.");
    const { guidance, hires, ...fields } = extra;
    return {
      ...made,
      ...fields,
      ...(guidance && { guidance: { ...made.guidance, ...guidance } }),
      ...(hires && { hires: { ...made.hires, ...hires } }),
    };
  };

  /** Shows choices of model, steps, sampler and guidance; the rest of the form stays. */
  const choose = (request) => {
    if (models.some(({ name }) => name === request.model)) form.model.value = request.model;
    form.steps.value = request.steps ?? "";
    follow();
    pickers.take(request, model());
  };

  /** Shows a whole request. */
  const show = async (request) => {
    form.prompt.value = request.prompt;
    choose(request);
    for (const name of [...TEXTS, ...NUMBERS]) form[name].value = request[name] ?? "";
    form.output_format.value = request.output_format ?? "png";
    for (const part of parts) part.show(request, model());
    const rest = others(request, model());
    form.extra.value = Object.keys(rest).length ? JSON.stringify(rest) : "";
    form.resize_mode.value = request.resize_mode ?? "";
    picture.put(request.image ?? null);
    reference.put(request.reference ?? null);
    await mask.over(request.image ?? null);
    if (request.mask) await mask.put(request.mask);
  };

  /** Shows a picture to start from; a request from a picture has no second run. */
  const startFrom = (dataUri) => {
    hires.show({}, model());
    picture.put(dataUri);
  };

  return { read, choose, show, model, startFrom };
}

/** Buttons among which one is pressed. */
export function segments(fieldset, entries, onChoose) {
  for (const { name, title } of entries) {
    const radio = create("input", { type: "radio", name: "preset", value: name });
    radio.addEventListener("change", () => onChoose(name));
    fieldset.append(create("label", {}, radio, title));
  }
}
