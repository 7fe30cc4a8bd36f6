/** A grid of pictures with its labels, as one PNG. */

const CELL = 256;
const MARGIN = 16;
const LINE = 20;
const FONT = "14px system-ui, sans-serif";
const SIDE = 150;

/** The lines of a text that fit a width. */
function wrapped(context, text, width) {
  const lines = [];
  for (const word of text.split(/\s+/)) {
    const longer = lines.length ? `${lines.at(-1)} ${word}` : word;
    if (lines.length && context.measureText(longer).width <= width) lines[lines.length - 1] = longer;
    else lines.push(word);
  }
  return lines;
}

/**
 * Draws a grid.
 *
 * @param grid `title`, `across` and `down`: `{name, values}`, and `images[row][column]`: elements, or
 *   null where there is none.
 * @returns a blob.
 */
export function gridPng({ title, across, down, images }) {
  const canvas = document.createElement("canvas");
  const context = canvas.getContext("2d");
  context.font = FONT;
  const shapes = images.flat().filter(Boolean).map(({ naturalWidth, naturalHeight }) => naturalHeight / naturalWidth);
  const height = Math.round(CELL * Math.max(...shapes, 0.5));
  const width = SIDE + across.values.length * (CELL + MARGIN) + MARGIN;
  const heading = wrapped(context, title, width - 2 * MARGIN);
  const labels = across.values.map((value) => wrapped(context, `${across.name} ${value}`, CELL));
  const top = MARGIN + (heading.length + Math.max(...labels.map((lines) => lines.length)) + 0.5) * LINE;
  canvas.width = width;
  canvas.height = top + down.values.length * (height + MARGIN);
  Object.assign(context, { font: FONT, fillStyle: "white", textBaseline: "top" });
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.fillStyle = "black";
  const write = (lines, x, y) => lines.forEach((line, index) => context.fillText(line, x, y + index * LINE));
  write(heading, MARGIN, MARGIN);
  labels.forEach((lines, column) => write(lines, SIDE + column * (CELL + MARGIN), top - lines.length * LINE - 2));
  down.values.forEach((value, row) => {
    const y = top + row * (height + MARGIN);
    write(wrapped(context, `${down.name} ${value}`, SIDE - 2 * MARGIN), MARGIN, y);
    images[row].forEach((image, column) => {
      if (!image) return;
      const scale = Math.min(CELL / image.naturalWidth, height / image.naturalHeight);
      context.drawImage(image, SIDE + column * (CELL + MARGIN), y, image.naturalWidth * scale, image.naturalHeight * scale);
    });
  });
  return new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
}
