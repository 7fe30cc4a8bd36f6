/** What the start noise is made of, beside the seed: `variation` and `noise_size`. */

const PARTS = {
  variation: { strength: "variation_strength", seed: "variation_seed" },
  noise_size: { width: "noise_width", height: "noise_height" },
};

/** The inputs of a form for them. */
export function startNoiseFields(form) {
  const fill = (request) => {
    for (const [field, names] of Object.entries(PARTS)) {
      const stated = Object.entries(names).filter(([, input]) => form[input].value).map(([name, input]) => [name, Number(form[input].value)]);
      if (stated.length) request[field] = Object.fromEntries(stated);
    }
  };
  const show = (request) => {
    for (const [field, names] of Object.entries(PARTS)) {
      for (const [name, input] of Object.entries(names)) form[input].value = request[field]?.[name] ?? "";
    }
  };
  return { fill, show };
}
