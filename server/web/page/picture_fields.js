/** Fields that list pictures which the model is shown, each by something that it has: an IP-Adapter, a ControlNet. */

import { create, select } from "./fields.js";
import { upload } from "./upload.js";

const NUMBERS = {
  scale: { title: "Scale ", max: 4, placeholder: 1 },
  start: { title: "Start ", max: 1, placeholder: 0 },
  end: { title: "End ", max: 1, placeholder: 1 },
};

const without = (object) => Object.fromEntries(Object.entries(object).filter(([, value]) => value !== null));

/** One entry of such a list, with `offer(names)` and `read()`. */
function rowOf(entry, title, words, region) {
  const pictures = { image: upload("Picture", words), ...(region && { mask: upload("Mask", region) }) };
  // What settings have and no input here shows stays as it is.
  const shown = ["name", ...Object.keys(pictures), ...Object.keys(NUMBERS)];
  const others = Object.fromEntries(Object.entries(entry).filter(([name]) => !shown.includes(name)));
  const inputs = {};
  for (const [name, { max, placeholder }] of Object.entries(NUMBERS)) {
    inputs[name] = create("input", { type: "number", min: 0, max, step: "any", placeholder, value: entry[name] ?? "" });
  }
  const numbers = Object.entries(inputs).map(([name, input]) => create("label", {}, NUMBERS[name].title, input));
  let names = select([entry.name], entry.name);
  const row = create("fieldset", {}, create("legend", {}, title[0].toUpperCase() + title.slice(1)), names, ...Object.values(pictures),
    create("div", { className: "basics thirds" }, ...numbers), create("small", {}, "Start and end are shares of the run between which it acts."));
  row.offer = (offered) => {
    const chosen = names.read() ?? offered[0];
    // A name that this model does not have stays, so that the server can say so.
    const offering = select(offered.includes(chosen) ? offered : [...offered, chosen], chosen);
    offering.ariaLabel = `Name of the ${title}`;
    names.replaceWith(offering);
    names = offering;
  };
  row.read = () => {
    const stated = Object.entries(inputs).map(([name, { value }]) => [name, value ? Number(value) : null]);
    const chosen = Object.entries(pictures).map(([name, picture]) => [name, picture.read()]);
    return without({ ...others, name: names.read(), ...Object.fromEntries([...chosen, ...stated]) });
  };
  row.focus = () => names.focus();
  for (const [name, picture] of Object.entries(pictures)) if (entry[name]) picture.put(entry[name]);
  return row;
}

/**
 * The inputs for such a field.
 *
 * @param place an element for them; the details around it are hidden while there is nothing to
 *   offer and nothing to show.
 * @param field name in a request, and of what the model has in the catalog.
 * @param title of one entry, as within a sentence.
 * @param words about its picture.
 * @param region about a mask of where it acts; without, there is none.
 */
export function pictureFields(place, field, title, words, region) {
  const rows = create("div");
  const add = create("button", { type: "button", textContent: `Add ${title}` });
  let offered = [];
  place.className = "pictures";
  place.replaceChildren(rows, add);

  const reveal = () => {
    add.hidden = !offered.length;
    place.closest("details").hidden = !offered.length && !rows.children.length;
  };
  const append = (entry) => {
    const row = rowOf(entry, title, words, region);
    const remove = create("button", { type: "button", textContent: `Remove ${title}` });
    remove.addEventListener("click", () => {
      row.remove();
      reveal();
      add.focus();
    });
    row.offer(offered);
    row.append(remove);
    rows.append(row);
    return row;
  };
  add.addEventListener("click", () => append({}).focus());

  const offer = (model) => {
    offered = model[field].map(({ name }) => name);
    for (const row of rows.children) row.offer(offered);
    reveal();
  };
  const fill = (request) => {
    if (rows.children.length) request[field] = [...rows.children].map((row) => row.read());
  };
  const show = (request) => {
    rows.replaceChildren();
    for (const entry of request[field] ?? []) append(entry);
    reveal();
  };
  return { offer, fill, show };
}
