/** The pictures of the page: one large, all as tiles, with those under way first. */

import { create } from "./fields.js";
import { forget, keep, kept } from "./gallery_store.js";

const $ = (id) => document.getElementById(id);
const tiles = $("pictures");
let shown = null;
let lastId = 0;

/** Ids sort as the pictures came, also between visits. */
const newId = () => (lastId = Math.max(Date.now(), lastId + 1));

/** A picture: an image's address, what is said of it, and once it is finished how it was made. */
function open(prompt, fields) {
  const image = create("img", { alt: prompt, loading: "lazy", hidden: true });
  const bar = create("progress", { value: 0, hidden: true });
  const button = create("button", { type: "button", className: "tile" }, image, bar);
  const picture = { id: newId(), prompt, caption: "", share: 0, src: "", element: create("li", {}, button), image, bar, button, ...fields };
  button.addEventListener("click", () => show(picture));
  tiles.prepend(picture.element);
  $("gallery-words").hidden = false;
  return picture;
}

/** Draws what is known of a picture. */
function draw(picture) {
  const { image, bar, button, src, caption, prompt, share, isDone } = picture;
  image.hidden = !src;
  if (src && image.src !== src) image.src = src;
  bar.hidden = isDone;
  bar.value = share;
  button.ariaLabel = `${prompt}, ${caption}`;
  button.classList.toggle("running", !isDone);
  if (picture === shown) drawLarge();
}

function drawLarge() {
  const { src, caption, share, isDone, prompt } = shown ?? {};
  $("empty").hidden = Boolean(shown);
  $("large").hidden = !src;
  if (src) $("large").src = src;
  $("large").alt = prompt ?? "";
  $("progress").hidden = !shown || isDone;
  $("progress").value = share ?? 0;
  $("caption").textContent = caption ?? "";
  for (const { button, element } of shown ? [shown] : []) {
    for (const other of tiles.querySelectorAll("[aria-current]")) other.removeAttribute("aria-current");
    if (element.isConnected) button.setAttribute("aria-current", "true");
  }
}

let onShow = () => {};

function show(picture) {
  shown = picture;
  drawLarge();
  onShow(picture);
}

function remove(picture) {
  const next = picture.element.nextElementSibling ?? picture.element.previousElementSibling;
  picture.element.remove();
  if (picture.src.startsWith("blob:")) URL.revokeObjectURL(picture.src);
  if (picture !== shown) return;
  show(null);
  next?.querySelector("button").click();
}

/** Calls back with each picture that is shown large, and with null. */
export const whenShown = (heard) => { onShow = heard; };

/** The picture that is shown large, or null. */
export const current = () => shown;

/**
 * Pictures of a request, which wait.
 *
 * @param prompt of all of them.
 * @param count how many.
 * @param cancel ends the request.
 */
export function begin(prompt, count, cancel) {
  const made = Array.from({ length: count }, () => open(prompt, { caption: "waiting", cancel, isDone: false }));
  // The tiles stand newest first, and those of one request in their order.
  tiles.prepend(...made.map(({ element }) => element));
  for (const picture of made) {
    const stop = create("button", { type: "button", className: "stop", textContent: "×", ariaLabel: `Cancel: ${prompt}`, onclick: cancel });
    picture.element.append(stop);
    picture.stop = stop;
    draw(picture);
  }
  show(made[0]);
  return made;
}

/** Shows how far a picture has come. */
export function tell(picture, changes) {
  Object.assign(picture, changes);
  draw(picture);
}

/** Shows a finished picture and keeps it. */
export async function finish(picture, blob, caption, request) {
  picture.stop.remove();
  tell(picture, { src: URL.createObjectURL(blob), blob, caption, request, isDone: true });
  if (picture === shown) show(picture);
  const dropped = new Set(await keep({ id: picture.id, prompt: picture.prompt, blob, caption, request }));
  for (const tile of [...tiles.children]) if (dropped.has(Number(tile.dataset.id))) tile.remove();
  picture.element.dataset.id = picture.id;
}

/** Takes pictures out that will not be finished. */
export const drop = (pictures) => pictures.forEach(remove);

/** Removes a finished picture for good. */
export async function discard(picture) {
  remove(picture);
  await forget(picture.id);
}

/** Brings back what earlier visits kept; it stands behind what has come since. */
export async function restore() {
  const before = [...tiles.children];
  for (const one of await kept()) {
    const picture = open(one.prompt, { ...one, src: URL.createObjectURL(one.blob), isDone: true });
    picture.element.dataset.id = one.id;
    draw(picture);
  }
  tiles.prepend(...before);
  if (!shown) tiles.querySelector("button")?.click();
}
