/** The second run of a request, which draws the picture once more, larger. */

const LEAST = 1;
const MOST = 8;

/** What the server makes of a side: as many pixels as the model draws. */
const enlarged = (side, scale, multiple) => {
  const pixels = Math.round(scale * side);
  return Math.max(multiple, pixels - (pixels % multiple));
};

/**
 * The scale, in few digits, that makes one size of another; undefined if none does.
 *
 * @param from width and height.
 * @param to width and height.
 * @param multiple pixels of which the model draws whole multiples.
 */
function scaleBetween(from, to, multiple) {
  const least = Math.max(...to.map((side, axis) => side / from[axis]));
  const makes = (scale) => scale >= LEAST && scale <= MOST && to.every((side, axis) => enlarged(from[axis], scale, multiple) === side);
  return [least.toPrecision(2), least.toPrecision(3), least].map(Number).find(makes);
}

/** The part of `hires` that its inputs do not show: a size that is no multiple of the first. */
export function sizeBeside({ width, height, hires }, { size_multiple: multiple }) {
  if (!hires?.width) return null;
  const size = [hires.width, hires.height];
  return scaleBetween([width, height], size, multiple) ? null : { width: hires.width, height: hires.height };
}

/** The inputs of a form for `hires`, with the upscalers of the catalog. */
export function hiresFields(form, upscalers) {
  const numbers = { scale: form.hires_scale, strength: form.hires_strength, steps: form.hires_steps };
  const details = form.querySelector("#hires");
  const reveal = () => { details.hidden = !form.upscaler.value; };
  form.upscaler.replaceChildren(new Option("off", ""), ...upscalers.map((name) => new Option(name)));
  form.upscaler.addEventListener("change", reveal);
  reveal();

  const fill = (request) => {
    if (!form.upscaler.value) return;
    request.hires = { upscaler: form.upscaler.value };
    for (const [name, input] of Object.entries(numbers)) if (input.value) request.hires[name] = Number(input.value);
  };
  const show = ({ width, height, steps, hires }, { size_multiple: multiple }) => {
    form.upscaler.value = hires ? hires.upscaler ?? upscalers[0] : "";
    const scale = hires?.width ? scaleBetween([width, height], [hires.width, hires.height], multiple) : hires?.scale;
    numbers.scale.value = scale ?? "";
    numbers.strength.value = hires?.strength ?? "";
    numbers.steps.value = hires?.steps && hires.steps !== steps ? hires.steps : "";
    reveal();
  };
  return { fill, show };
}
