/** The field `reference_images`: pictures that the prompt is about. */

import { create } from "./fields.js";
import { listFields } from "./list_fields.js";
import { upload } from "./upload.js";

function rowOf(dataUri) {
  const picture = upload("Picture", "The prompt says what to change in it, or what to take from it.");
  if (dataUri) picture.put(dataUri);
  const row = create("div", {}, picture);
  row.offer = () => {};
  row.read = picture.read;
  row.focus = () => picture.querySelector("input").focus();
  return row;
}

/**
 * The inputs for it, as many as the model reads.
 *
 * @param place an element for them.
 */
export function referenceFields(place) {
  const field = "reference_images";
  const list = listFields(place, field, "picture", (model) => model[field], rowOf);
  // The settings in a picture say how many there were, and have none of them.
  const show = (request) => list.show(Array.isArray(request[field]) ? request : {});
  return { ...list, show };
}
