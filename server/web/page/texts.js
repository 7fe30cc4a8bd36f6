/** What a model has for its texts: syntaxes, layers of CLIP to read, and words that embeddings stand for. */

import { create } from "./fields.js";

/** The inputs of a form for `prompt_syntax` and `clip_skip`, and buttons that put a word into the text that was used last. */
export function textFields(form) {
  const syntaxes = form.querySelector("#prompt-syntax");
  const skips = form.querySelector("#clip-skip");
  const words = form.querySelector("#embeddings");
  let last = form.prompt;
  for (const text of [form.prompt, form.negative_prompt]) text.addEventListener("focus", () => { last = text; });

  const insert = (word) => {
    last.value = [last.value, word].filter(Boolean).join(", ");
    last.focus();
  };
  const offer = ({ clip_skips, embeddings, prompt_syntaxes }) => {
    const syntax = form.prompt_syntax.value;
    form.prompt_syntax.replaceChildren(new Option("plain text", ""), ...prompt_syntaxes.map((name) => new Option(name)));
    form.prompt_syntax.value = prompt_syntaxes.includes(syntax) ? syntax : "";
    syntaxes.hidden = !prompt_syntaxes.length;
    const before = form.clip_skip.value;
    form.clip_skip.replaceChildren(new Option(`the model's own: ${clip_skips[0]}`, ""), ...clip_skips.map((layer) => new Option(layer)));
    form.clip_skip.value = clip_skips.includes(Number(before)) ? before : "";
    skips.hidden = !clip_skips.length;
    words.hidden = !embeddings.length;
    words.querySelector(".chips").replaceChildren(...embeddings.map(({ name, vectors }) => {
      const title = `${vectors} ${vectors === 1 ? "token" : "tokens"}`;
      return create("button", { type: "button", textContent: name, title, onclick: () => insert(name) });
    }));
  };
  const fill = (request) => {
    if (form.prompt_syntax.value) request.prompt_syntax = form.prompt_syntax.value;
    if (form.clip_skip.value) request.clip_skip = Number(form.clip_skip.value);
  };
  const show = (request, { clip_skips, prompt_syntaxes }) => {
    form.prompt_syntax.value = prompt_syntaxes.includes(request.prompt_syntax) ? request.prompt_syntax : "";
    form.clip_skip.value = clip_skips.includes(request.clip_skip) ? request.clip_skip : "";
  };
  return { offer, fill, show };
}
