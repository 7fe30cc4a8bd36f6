/** Fields that list pictures which the model is shown, each by something that it has: an IP-Adapter, a ControlNet. */

import { create } from "./fields.js";
import { listFields, nameField } from "./list_fields.js";
import { upload, uploads } from "./upload.js";

const MOST = 4;
const MOST_PICTURES = 4;

const NUMBERS = {
  scale: { title: "Scale ", max: 4, placeholder: 1 },
  start: { title: "Start ", max: 1, placeholder: 0 },
  end: { title: "End ", max: 1, placeholder: 1 },
};

const without = (object) => Object.fromEntries(Object.entries(object).filter(([, value]) => value !== null));

/** The inputs of one entry of such a list, or of a new one. */
function rowOf(given, field, title, pictures) {
  const entry = given ?? {};
  // What settings have and no input here shows stays as it is.
  const shown = ["name", ...Object.keys(pictures), ...Object.keys(NUMBERS)];
  const others = Object.fromEntries(Object.entries(entry).filter(([name]) => !shown.includes(name)));
  const inputs = {};
  for (const [name, { max, placeholder }] of Object.entries(NUMBERS)) {
    inputs[name] = create("input", { type: "number", min: 0, max, step: "any", placeholder, value: entry[name] ?? "" });
  }
  const numbers = Object.entries(inputs).map(([name, input]) => create("label", {}, NUMBERS[name].title, input));
  const names = nameField(title, entry.name);
  const row = create("div", {}, names, ...Object.values(pictures),
    create("div", { className: "basics thirds" }, ...numbers), create("small", {}, "Start and end are shares of the run between which it acts."));
  row.offer = (model, taken) => names.offer(model[field].map(({ name }) => name), taken);
  row.read = () => {
    const stated = Object.entries(inputs).map(([name, { value }]) => [name, value ? Number(value) : null]);
    const chosen = Object.entries(pictures).map(([name, picture]) => [name, picture.read()]);
    return without({ ...others, name: names.value, ...Object.fromEntries([...chosen, ...stated]) });
  };
  row.focus = () => names.focus();
  for (const [name, picture] of Object.entries(pictures)) if (entry[name]) picture.put(entry[name]);
  return row;
}

/**
 * The inputs for such a field.
 *
 * @param place an element for them.
 * @param field name in a request, and of what the model has in the catalog.
 * @param title of one entry, as within a sentence.
 * @param picturesOf makes the inputs for the pictures of an entry, by their fields.
 */
function pictureFields(place, field, title, picturesOf) {
  const mostOf = (model) => (model[field].length ? MOST : 0);
  return listFields(place, field, title, mostOf, (entry) => rowOf(entry, field, title, picturesOf()));
}

/** The inputs for `image_prompts`. */
export const imagePromptFields = (place) => pictureFields(place, "image_prompts", "image prompt", () => ({
  image: uploads("Picture", "What the images should resemble, in content or style. The square in its middle is read. Several are attended to together.", MOST_PICTURES),
  mask: upload("Mask", "White where in the images it acts, black where not. Without, it acts everywhere."),
}));

/** The inputs for `controls`. */
export const controlFields = (place) => pictureFields(place, "controls", "ControlNet", () => ({
  image: upload("Picture", "Its input picture, such as edges, a depth map or a pose, prepared as for its training."),
}));
