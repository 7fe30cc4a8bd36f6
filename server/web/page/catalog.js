/** Choices among the entries of the server's catalog. */

import { create, equal, object, select } from "./fields.js";

/** A choice among entries of the catalog, with the fields of the chosen one. */
function picker({ title, description, blank }) {
  const element = create("fieldset", { className: "picker" });
  let entry, fields, names, untouched;
  let isTaken = false;
  element.offer = (entries, chosen) => {
    const known = entries.map((one) => one.name);
    names = select(blank ? [null, ...known] : known, chosen ? chosen.name ?? known[0] : null, blank);
    const details = create("div");
    const show = () => {
      entry = entries.find((one) => one.name === names.read());
      if (!entry) return details.replaceChildren();
      const { properties, $defs } = entry.parameters;
      fields = object({ properties }, { ...entry.defaults, ...(chosen?.name === entry.defaults.name && chosen) }, $defs);
      const origin = entry.plugin ? ` (from ${entry.plugin})` : "";
      details.replaceChildren(create("small", { title: entry.source }, entry.summary + origin), fields);
    };
    names.ariaLabel = title;
    names.addEventListener("change", show);
    element.replaceChildren(create("legend", {}, title), names, create("small", {}, description), details);
    show();
    untouched = element.read();
    isTaken = false;
  };
  /** Shows a choice that stays where defaults change. */
  element.take = (entries, chosen) => {
    element.offer(entries, chosen);
    isTaken = true;
  };
  /** Goes back to following the defaults. */
  element.release = () => {
    untouched = element.read();
    isTaken = false;
  };
  element.read = () => {
    if (!entry) return undefined;
    const changed = Object.entries(fields.read()).filter(([name, value]) => !equal(value, entry.defaults[name]));
    return { ...("name" in entry.defaults && { name: entry.name }), ...Object.fromEntries(changed) };
  };
  element.isUntouched = () => !isTaken && equal(element.read(), untouched);
  return element;
}

/** Merges a value into an object at a path. */
function put(into, [first, ...rest], value) {
  if (!rest.length) into[first] = { ...into[first], ...value };
  else put(into[first] ??= rest[0] === "0" ? [] : {}, rest, value);
}

/** Where a request states a choice; for a list, its first entry. */
const path = ({ field, most }) => [...field.split("."), ...(most > 1 ? ["0"] : [])];

/**
 * What a request states for a choice: undefined where the server chooses, null for none. Guidance
 * that is named states all of its parts.
 */
function stated(choice, request) {
  const chosen = path(choice).reduce((within, field) => within?.[field], request);
  if (choice.field === "guidance") return chosen?.name ? chosen : undefined;
  return chosen ?? (choice.field.startsWith("guidance.") && request.guidance?.name && choice.blank ? null : undefined);
}

/** The terms of the model's classifier, with a choice among the classes that it has. */
function aimed(entries, classes) {
  const properties = Object.fromEntries(Object.entries(classes).map(([attribute, names]) => [attribute, { enum: [undefined, ...names] }]));
  return entries.map((entry) => {
    const { target, ...others } = entry.parameters.properties;
    if (!target) return entry;
    return { ...entry, parameters: { ...entry.parameters, properties: { target: { ...target, properties }, ...others } } };
  });
}

/**
 * Pickers for choices of the catalog. They show the defaults of the followed model, and of the
 * sampler, where the user has chosen nothing else.
 *
 * @param catalog the server's.
 * @param place gives the element that a choice belongs in, or null for none.
 */
export function pickersOf({ choices, ...offered }, place) {
  const placed = choices.filter(place);
  const pickers = {};
  let model, lists;
  for (const choice of placed) {
    pickers[choice.entries] = picker(choice);
    place(choice).append(pickers[choice.entries]);
  }
  const followSampler = () => {
    const { defaults } = model;
    const { name } = pickers.samplers.read();
    const own = defaults.guidance_by_sampler[name] ?? defaults.guidance;
    if (pickers.rules.isUntouched()) pickers.rules.offer(offered.rules, own);
    const spacing = name === defaults.sampler.name ? defaults.spacing : null;
    if (pickers.spacings.isUntouched()) pickers.spacings.offer(offered.spacings, spacing);
  };
  const follow = (chosenModel) => {
    model = chosenModel;
    lists = { ...offered, classifiers: aimed(offered.classifiers, model.classifier) };
    for (const choice of placed) {
      const picked = pickers[choice.entries];
      const chosen = path(choice).reduce((within, field) => within?.[field], model.defaults);
      if (picked.isUntouched() || choice.entries === "classifiers") picked.offer(lists[choice.entries], chosen);
    }
    followSampler();
  };
  /** Shows what a request states for a model, and that model's defaults for the rest. */
  const take = (request, chosenModel) => {
    for (const choice of placed) pickers[choice.entries].release();
    follow(chosenModel);
    for (const choice of placed) {
      const chosen = stated(choice, request);
      if (chosen !== undefined) pickers[choice.entries].take(lists[choice.entries], chosen);
    }
    followSampler();
  };
  /** Adds what is chosen to a request. */
  const fill = (request) => {
    for (const choice of placed) {
      const chosen = pickers[choice.entries].read();
      if (chosen) put(request, path(choice), chosen);
    }
    return request;
  };
  pickers.samplers.addEventListener("change", followSampler);
  return { follow, take, fill };
}
