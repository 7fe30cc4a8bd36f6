/** What a grid can compare: parameters of a request, their values as text, and requests with them. */

const SUGGESTED = { steps: "4, 8, 16, 25", seed: "1, 2, 3, 4", strength: "0.3, 0.5, 0.7, 0.9", "guidance.scale": "1, 2, 4, 7.5" };
const FEW = 4;
const SEPARATOR = /\s*[,|]\s*/;

const kindsOf = ({ anyOf, ...own }) => (anyOf ?? [own]).filter(({ type }) => type !== "null");

/** Values around a field's default; null if the field is none to compare. */
function around(field) {
  const kinds = kindsOf(field);
  const names = kinds.flatMap((kind) => kind.enum ?? (kind.type === "boolean" ? [false, true] : []));
  if (names.length) return names.map(String);
  const number = kinds.find(({ type }) => type === "number" || type === "integer");
  if (!number || "const" in field) return null;
  const from = field.default || 1;
  const round = number.type === "integer" ? Math.round : (value) => Number(value.toPrecision(3));
  const least = number.minimum ?? -Infinity;
  const most = number.maximum ?? Infinity;
  return [...new Set([from / 2, from, from * 2].map((value) => round(Math.min(most, Math.max(least, value)))))].map(String);
}

/** The fields of a chosen entry of the catalog as axes. */
function fieldsOf(path, entries, chosen) {
  const entry = entries.find(({ name }) => name === chosen?.name);
  return Object.entries(entry?.parameters.properties ?? {}).flatMap(([name, field]) => {
    const values = around(field);
    const axis = { name: `${path}.${name}`, words: field.description ?? "" };
    return values ? [{ ...axis, suggested: SUGGESTED[axis.name] ?? values.join(", ") }] : [];
  });
}

const named = (name, entries) => ({
  name,
  suggested: entries.slice(0, FEW).map((one) => one.name).join(", "),
  words: `Any of ${entries.map((one) => one.name).join(", ")}.`,
});

/** The parameters that a grid of a request can compare: `name`, `suggested` values and `words`. */
export function axesOf({ request, catalog }) {
  const model = catalog.models.find(({ name }) => name === request.model);
  const sizes = [model.width / 2, model.width].join(", ");
  return [
    { name: "steps", suggested: SUGGESTED.steps, words: "Number of steps." },
    named("sampler", catalog.samplers),
    named("spacing", catalog.spacings),
    named("guidance", catalog.rules),
    named("guidance.policy", catalog.policies),
    ...fieldsOf("guidance", catalog.rules, request.guidance),
    ...fieldsOf("guidance.policy", catalog.policies, request.guidance?.policy),
    ...fieldsOf("sampler", catalog.samplers, request.sampler),
    { name: "seed", suggested: SUGGESTED.seed, words: "Whole numbers." },
    { name: "prompt", suggested: request.prompt, words: "Texts, with | or a comma between them." },
    { name: "width", suggested: sizes, words: "In pixels." },
    { name: "height", suggested: sizes, words: "In pixels." },
    ...(catalog.models.length > 1 ? [named("model", catalog.models)] : []),
    ...(request.image ? [{ name: "strength", suggested: SUGGESTED.strength, words: "Share of the steps that are run from the picture." }] : []),
  ];
}

/** The values of a text; a text with a bar may have commas in its values. */
export function valuesOf(text) {
  const separator = text.includes("|") ? /\s*\|\s*/ : SEPARATOR;
  return text.trim().split(separator).filter(Boolean);
}

const parsed = (name, text) => {
  if (name === "prompt") return text;
  try { return JSON.parse(text); } catch { return text; }
};

/** What a name leaves of what it replaces: a rule's own fields belong to it, the parts of guidance do not. */
const beside = (name, held, parts) =>
  name === "guidance" ? Object.fromEntries(Object.entries(held ?? {}).filter(([field]) => parts.includes(field))) : {};

/**
 * A request with values of some parameters.
 *
 * @param request that is changed.
 * @param chosen pairs of a parameter's name and a value's text.
 * @param catalog the server's.
 */
export function withValues(request, chosen, catalog) {
  const parts = catalog.choices.map(({ field }) => field.split(".")[1]).filter(Boolean);
  const lists = catalog.choices.map(({ field }) => field);
  const made = structuredClone(request);
  // A name first, then the fields of what it names.
  const ordered = chosen.toSorted(([one], [other]) => one.split(".").length - other.split(".").length);
  for (const [name, text] of ordered) {
    const path = name.split(".");
    const last = path.pop();
    const within = path.reduce((object, field) => (object[field] ??= {}), made);
    const value = parsed(name, text);
    within[last] = lists.includes(name) ? { ...beside(name, within[last], parts), name: value } : value;
  }
  return made;
}
