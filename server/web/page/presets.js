/** Settings for people who choose nothing else, as docs/choosing.md recommends them. */

const isDistilled = (model) => model.defaults.convention !== null;

/** A model that is sampled with guidance and many steps: the chosen one, if it is such a model. */
const patient = (model, models) => [model, ...models].find((one) => !isDistilled(one)) ?? model;

const quick = (model, models) => [model, ...models].find(isDistilled);

/**
 * Each makes the fields of a request that it states, from the chosen model and all of them; what it
 * leaves out is as the server chooses.
 */
export const PRESETS = [
  {
    name: "fast",
    title: "Fast",
    fields(model, models) {
      const distilled = quick(model, models);
      return distilled ? { model: distilled.name } : { model: model.name, steps: 10, sampler: { name: "deis" } };
    },
    words(model, models) {
      const distilled = quick(model, models);
      if (!distilled) return "10 steps of a sampler that is accurate with few.";
      return `${distilled.name}, a model made for few steps: ${distilled.defaults.steps}.`;
    },
  },
  {
    name: "balanced",
    title: "Balanced",
    fields: (model, models) => ({ model: patient(model, models).name }),
    words: (model, models) => `What the server chooses: ${patient(model, models).defaults.steps} steps, natural colors.`,
  },
  {
    name: "best",
    title: "Best",
    fields(model, models) {
      const chosen = patient(model, models);
      if (isDistilled(chosen)) return { model: chosen.name, steps: 2 * chosen.defaults.steps };
      const guidance = { name: "magnitude_aware", scale: 7.5, policy: { name: "reuse" } };
      return { model: chosen.name, steps: 20, guidance };
    },
    words(model, models) {
      if (isDistilled(patient(model, models))) return "Twice the steps that the server chooses.";
      return "Strong guidance that holds its contrast: the most prompts drawn right for its time, in our study.";
    },
  },
];
