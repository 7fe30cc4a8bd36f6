/** Prompts that show what a model draws, for the models that come with the server. */

const SHAPES = {
  words: "This small model draws circles, squares, triangles, stars and rings: one or two, colored, on a plain background, at sunset or in the sky.",
  prompts: [
    "a large red circle on a white background",
    "a blue square to the left of a yellow circle",
    "a green triangle at sunset",
    "a small cyan ring on a black background",
    "a purple star above an orange square",
    "a pink ring in the sky",
  ],
};

const BY_MODEL = new Map(["", "-lcm"].map((suffix) => [`embedded${suffix}`, SHAPES]));

/** What a model draws and prompts that show it; undefined where nothing is known. */
export const examplesOf = (model) => BY_MODEL.get(model);
