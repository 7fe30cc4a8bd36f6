/** Fields that are lists, whose entries are added and removed one by one. */

import { create } from "./fields.js";

/**
 * A choice among the names of what a model has, with `offer(names, taken)`; a name that the model
 * does not have stays, so that the server can say so, and a new one is none that is taken.
 */
export function nameField(title, value) {
  const element = create("select", { ariaLabel: `Name of the ${title}` });
  element.offer = (names, taken) => {
    const chosen = element.value || value || (names.find((name) => !taken.includes(name)) ?? names[0]);
    const offered = names.includes(chosen) ? names : [...names, chosen];
    element.replaceChildren(...offered.map((name) => new Option(name)));
    element.value = chosen;
  };
  return element;
}

/**
 * The inputs for such a field.
 *
 * @param place an element for them; the details around it are hidden while there is nothing to
 *   offer and nothing to show.
 * @param field name in a request.
 * @param title of one entry, as within a sentence.
 * @param mostOf gives the number of entries that a model takes.
 * @param rowOf makes the inputs of an entry, null for a new one, with `offer(model, taken)`, where
 *   `taken` are the names of the other entries, `focus()` and `read()`, which gives null for an
 *   entry without a value.
 */
export function listFields(place, field, title, mostOf, rowOf) {
  const rows = create("div");
  const add = create("button", { type: "button", textContent: `Add ${title}` });
  let model;
  place.className = "entries";
  place.replaceChildren(rows, add);

  const namesBeside = (row) => [...rows.children].filter((one) => one !== row).map((one) => one.read()?.name);
  const offerTo = (row) => row.offer(model, namesBeside(row));
  const reveal = () => {
    const most = mostOf(model);
    add.hidden = rows.children.length >= most;
    place.closest("details").hidden = !most && !rows.children.length;
  };
  const append = (entry) => {
    const inputs = rowOf(entry);
    const remove = create("button", { type: "button", textContent: `Remove ${title}` });
    const row = create("fieldset", { read: inputs.read, offer: inputs.offer },
      create("legend", {}, title[0].toUpperCase() + title.slice(1)), inputs, remove);
    remove.addEventListener("click", () => {
      row.remove();
      reveal();
      add.focus();
      place.dispatchEvent(new Event("change", { bubbles: true }));
    });
    offerTo(row);
    rows.append(row);
    reveal();
    return inputs;
  };
  add.addEventListener("click", () => append(null).focus());

  const offer = (chosen) => {
    model = chosen;
    for (const row of rows.children) offerTo(row);
    reveal();
  };
  const fill = (request) => {
    const stated = [...rows.children].map((row) => row.read()).filter(Boolean);
    if (stated.length) request[field] = stated;
  };
  const show = (request) => {
    rows.replaceChildren();
    for (const entry of [request[field] ?? []].flat()) append(entry);
    reveal();
  };
  return { offer, fill, show };
}
