/** Inputs for what JSON schemas describe. */

export const equal = (one, other) => JSON.stringify(one) === JSON.stringify(other);

export function create(tag, properties, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

const SCALARS = ["string", "number", "integer"];

// An input's `read()` gives its value. Invalid text is sent unchanged, so that the server can say
// what is wrong with it.

/** An input for a value that a JSON schema describes. */
export function input(schema, value, definitions) {
  const kinds = (schema.anyOf ?? [schema])
    .map((kind) => kind.$ref ? definitions[kind.$ref.split("/").at(-1)] : kind);
  const nullable = kinds.some((kind) => kind.type === "null");
  const [kind, ...others] = kinds.filter((kind) => kind.type !== "null");
  const of = others.length ? "several kinds" : kind.type;
  if (kind.enum && !others.length) return select(nullable ? [null, ...kind.enum] : kind.enum, value);
  if (of === "boolean") return nullable ? select([null, true, false], value) : checkbox(value);
  if (of === "number" || of === "integer") return number(kind, value, nullable);
  if (of === "string") return text(value ?? "", (typed) => nullable && !typed ? null : typed);
  if (of === "object" && kind.properties && !nullable) return object(kind, value, definitions);
  if (of === "array" && kind.items?.$ref && !nullable) return list(kind, value, definitions);
  if (of === "array" && SCALARS.includes(kind.items?.type) && !nullable) return separated(kind, value);
  return text(JSON.stringify(value) ?? "", parsed);
}

const parsed = (typed) => {
  try { return JSON.parse(typed); } catch { return typed; }
};

function text(value, meant) {
  const element = create("input", { value });
  return Object.assign(element, { read: () => meant(element.value) });
}

/** A comma-separated list of words or numbers. */
function separated(schema, value) {
  const meant = schema.items.type === "string" ? (one) => one : parsed;
  return text(value.join(", "), (typed) => typed.split(",").map((one) => one.trim()).filter(Boolean).map(meant));
}

function number(schema, value, nullable) {
  const element = create("input", {
    type: "number",
    step: schema.type === "integer" ? 1 : "any",
    min: schema.minimum ?? "",
    max: schema.maximum ?? "",
    required: !nullable,
    value: value ?? "",
  });
  return Object.assign(element, { read: () => element.value ? Number(element.value) : null });
}

function checkbox(checked) {
  const element = create("input", { type: "checkbox", checked });
  return Object.assign(element, { read: () => element.checked });
}

export function select(values, value, blank = "\u2013") {
  const element = create("select", {}, ...values.map((one) => new Option(one ?? blank)));
  element.selectedIndex = values.indexOf(value);
  return Object.assign(element, { read: () => values[element.selectedIndex] });
}

/** The fields of an object, each labelled. */
export function object(schema, value = {}, definitions) {
  const inputs = {};
  const element = create("div");
  for (const [name, field] of Object.entries(schema.properties)) {
    if ("const" in field) continue;
    const one = inputs[name] = input(field, name in value ? value[name] : field.default, definitions);
    const words = create("small", {}, field.description ?? "");
    element.append(
      one.matches("div")
        ? create("fieldset", {}, create("legend", {}, name), words, one)
        : create("label", {}, `${name} `, one, words)
    );
  }
  const read = () => Object.fromEntries(Object.entries(inputs).map(([name, one]) => [name, one.read()]));
  return Object.assign(element, { read });
}

/** A list of objects, with buttons to add and remove them. */
function list(schema, values, definitions) {
  const rows = create("div");
  const button = (textContent, onclick) => create("button", { type: "button", textContent, onclick });
  const add = (value) => {
    const one = input(schema.items, value, definitions);
    const row = create("div", { read: one.read }, one, button("Remove", () => row.remove()));
    rows.append(row);
  };
  values.forEach(add);
  const read = () => [...rows.children].map((row) => row.read());
  return create("div", { read }, rows, button("Add", () => add()));
}
