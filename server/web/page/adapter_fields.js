/** LoRA adapters: which the model draws with, and how strongly each. */

import { create } from "./fields.js";
import { listFields, nameField } from "./list_fields.js";

const MOST = 8;
const STRONGEST = 4;

const FIELD = "adapters";
const TITLE = "adapter";

/** The inputs of one adapter: its name, or an object of it and a weight. */
function rowOf(entry) {
  const { name, weight } = typeof entry === "string" ? { name: entry } : entry ?? {};
  const names = nameField(TITLE, name);
  const input = create("input", { type: "number", min: -STRONGEST, max: STRONGEST, step: "any", placeholder: 1, value: weight ?? "" });
  const row = create("div", {}, names, create("label", {}, "Weight ", input));
  row.offer = (model, taken) => names.offer(model[FIELD].map((one) => one.name), taken);
  row.read = () => ({ name: names.value, ...(input.value && { weight: Number(input.value) }) });
  row.focus = () => names.focus();
  return row;
}

/** The inputs for `adapters`. */
export function adapterFields(place) {
  return listFields(place, FIELD, TITLE, (model) => (model[FIELD].length ? MOST : 0), rowOf);
}
