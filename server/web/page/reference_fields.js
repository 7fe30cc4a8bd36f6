/** The field `reference_images`: pictures that the prompt is about. */

import { create } from "./fields.js";
import { upload } from "./upload.js";

/**
 * The inputs for it, as many as the model reads.
 *
 * @param place an element for them; the details around it are hidden while the model reads none and
 *   none is shown.
 */
export function referenceFields(place) {
  const rows = create("div");
  const add = create("button", { type: "button", textContent: "Add picture" });
  let most = 0;
  place.className = "pictures";
  place.replaceChildren(rows, add);

  const reveal = () => {
    add.hidden = rows.children.length >= most;
    place.closest("details").hidden = !most && !rows.children.length;
  };
  const append = (dataUri) => {
    const picture = upload("Picture", "What the prompt says is changed in it, or taken from it.");
    const remove = create("button", { type: "button", textContent: "Remove picture" });
    const row = create("fieldset", {}, create("legend", {}, "Picture"), picture, remove);
    row.read = picture.read;
    remove.addEventListener("click", () => {
      row.remove();
      reveal();
      add.focus();
    });
    if (dataUri) picture.put(dataUri);
    rows.append(row);
    reveal();
    return row;
  };
  add.addEventListener("click", () => append(null).querySelector("input").focus());

  const offer = (model) => {
    most = model.reference_images;
    reveal();
  };
  const fill = (request) => {
    const chosen = [...rows.children].map((row) => row.read()).filter(Boolean);
    if (chosen.length) request.reference_images = chosen;
  };
  const show = (request) => {
    rows.replaceChildren();
    // The settings in a picture say how many there were, and have none of them.
    if (Array.isArray(request.reference_images)) request.reference_images.forEach(append);
    reveal();
  };
  return { offer, fill, show };
}
