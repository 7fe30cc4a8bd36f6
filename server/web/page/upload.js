/** An input for a picture: chosen, dropped or pasted. */

import { create } from "./fields.js";

const asDataUri = (file) => new Promise((resolve, reject) => {
  const reader = new FileReader();
  reader.onload = () => resolve(reader.result);
  reader.onerror = () => reject(reader.error);
  reader.readAsDataURL(file);
});

/**
 * An input for a picture.
 *
 * @param label over it.
 * @param words that explain it.
 * @returns its element, with `read()` and `put(dataUri or null)`; it tells of changes by `change`.
 */
export function upload(label, words) {
  const file = create("input", { type: "file", accept: "image/png,image/jpeg,image/webp" });
  const preview = create("img", { alt: `${label}: chosen picture`, hidden: true });
  const clear = create("button", { type: "button", textContent: "Remove", hidden: true });
  const element = create("div", { className: "upload" }, create("label", { className: "wide" }, label, file), preview, clear, create("small", {}, words));
  let value = null;
  element.read = () => value;
  element.put = (dataUri) => {
    value = dataUri;
    if (value) preview.src = value;
    else file.value = "";
    preview.hidden = clear.hidden = !value;
    element.dispatchEvent(new Event("change", { bubbles: true }));
  };
  element.take = async (chosen) => element.put(await asDataUri(chosen));
  file.addEventListener("change", (event) => {
    event.stopPropagation();
    if (file.files[0]) element.take(file.files[0]);
  });
  clear.addEventListener("click", () => element.put(null));
  element.addEventListener("dragover", (event) => event.preventDefault());
  element.addEventListener("drop", (event) => {
    const [dropped] = event.dataTransfer.files;
    if (!dropped) return;
    event.preventDefault();
    event.stopPropagation();
    element.take(dropped);
  });
  return element;
}

/**
 * Inputs for up to so many pictures, of which the last one waits for another.
 *
 * @param label over each.
 * @param words that explain them.
 * @param most of them.
 * @returns their element, with `read()`, which gives null, a picture or a list of several, and
 *   `put(any of these)`.
 */
export function uploads(label, words, most) {
  const inputs = create("div");
  const element = create("div", {}, inputs, create("small", {}, words));
  const append = (value) => {
    const input = upload(label, "");
    inputs.append(input);
    if (value) input.put(value);
  };
  const isEmpty = (input) => !input.read();
  element.read = () => {
    const chosen = [...inputs.children].map((input) => input.read()).filter(Boolean);
    return chosen.length > 1 ? chosen : chosen[0] ?? null;
  };
  element.put = (values) => {
    inputs.replaceChildren();
    for (const value of [values ?? []].flat()) append(value);
    if (inputs.children.length < most) append(null);
  };
  element.addEventListener("change", () => {
    for (const input of [...inputs.children].filter(isEmpty)) if (input !== inputs.lastChild) input.remove();
    if (inputs.children.length < most && !isEmpty(inputs.lastChild)) append(null);
  });
  append(null);
  return element;
}
