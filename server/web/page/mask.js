/** A mask painted over a picture: white is repainted, black is kept. */

import { drawOn } from "./drawing.js";
import { create } from "./fields.js";

const LONGEST = 512;

/** Resolves once an image shows what is at an address; `decode()` may wait until its tab is seen. */
const showing = (image, src) => new Promise((resolve, reject) => {
  image.onload = resolve;
  image.onerror = () => reject(new Error("This browser cannot show the picture."));
  image.src = src;
});

/** An element to paint a mask in, with `over(dataUri or null)`, `read()` and `put(dataUri)`. */
export function maskPainter() {
  const picture = create("img", { alt: "" });
  const canvas = create("canvas", { tabIndex: 0 });
  canvas.setAttribute("role", "application");
  canvas.ariaLabel = "Part to repaint: arrow keys move, space puts the brush down and lifts it";
  const cursor = create("span", { className: "cursor", ariaHidden: "true" });
  const width = create("input", { type: "range", min: 8, max: 160, value: 64 });
  const erases = create("input", { type: "checkbox" });
  const clear = create("button", { type: "button", textContent: "Clear" });
  const sheet = create("div", { className: "sheet" }, picture, canvas, cursor);
  const element = create("div", { className: "mask", hidden: true }, create("small", {}, "Paint the part to repaint; without paint the whole picture changes."), sheet,
    create("div", { className: "basics" }, create("label", {}, "Brush ", width), create("label", {}, "Erase ", erases), clear));
  let isPainted = false;
  const pen = () => ({ color: erases.checked ? "black" : "white", width: Number(width.value) });
  const wipe = drawOn(canvas, cursor, pen, () => { isPainted = true; }, "black");
  const empty = () => {
    wipe();
    isPainted = false;
  };
  clear.addEventListener("click", empty);

  /** Resolves once the picture under the paint is there. */
  element.over = async (dataUri) => {
    element.hidden = !dataUri;
    if (!dataUri) {
      empty();
      return;
    }
    await showing(picture, dataUri);
    const scale = LONGEST / Math.max(picture.naturalWidth, picture.naturalHeight);
    canvas.width = Math.round(picture.naturalWidth * scale);
    canvas.height = Math.round(picture.naturalHeight * scale);
    empty();
  };
  element.read = () => (isPainted && !element.hidden ? canvas.toDataURL("image/png") : null);
  element.put = async (dataUri) => {
    const image = create("img");
    await showing(image, dataUri);
    canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
    isPainted = true;
  };
  return element;
}
