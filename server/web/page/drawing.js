/** A canvas to draw on, with a pointer or the keyboard. */

const STEP = 1 / 32;
const DIRECTIONS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

/**
 * Lets the user draw on a canvas.
 *
 * @param canvas that is drawn on.
 * @param cursor an element over it, which shows where the keyboard draws.
 * @param pen gives the color and the width, in pixels of the canvas.
 * @param onChange called after each change.
 * @param paper color of the empty canvas.
 * @returns a function that clears the canvas.
 */
export function drawOn(canvas, cursor, pen, onChange, paper = "white") {
  const context = canvas.getContext("2d");
  let from = null;
  let at = [0.5, 0.5];
  let isDown = false;

  const draw = (to) => {
    const { color, width } = pen();
    Object.assign(context, { strokeStyle: color, fillStyle: color, lineWidth: width, lineCap: "round" });
    context.beginPath();
    if (from) {
      context.moveTo(...from);
      context.lineTo(...to);
      context.stroke();
    } else {
      context.arc(...to, width / 2, 0, 2 * Math.PI);
      context.fill();
    }
    from = to;
    onChange();
  };
  const clear = () => {
    context.fillStyle = paper;
    context.fillRect(0, 0, canvas.width, canvas.height);
    onChange();
  };
  const underPointer = ({ clientX, clientY }) => {
    const { left, top, width, height } = canvas.getBoundingClientRect();
    return [((clientX - left) / width) * canvas.width, ((clientY - top) / height) * canvas.height];
  };
  const underCursor = () => [at[0] * canvas.width, at[1] * canvas.height];
  const showCursor = () => {
    cursor.style.left = `${100 * at[0]}%`;
    cursor.style.top = `${100 * at[1]}%`;
    cursor.classList.toggle("down", isDown);
  };

  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    from = null;
    draw(underPointer(event));
  });
  canvas.addEventListener("pointermove", (event) => {
    if (canvas.hasPointerCapture(event.pointerId)) draw(underPointer(event));
  });
  canvas.addEventListener("keydown", (event) => {
    const direction = DIRECTIONS[event.key];
    if (direction) at = at.map((one, axis) => Math.min(1, Math.max(0, one + STEP * direction[axis])));
    else if (event.key === " ") {
      isDown = !isDown;
      from = null;
    } else return;
    event.preventDefault();
    showCursor();
    if (isDown) draw(underCursor());
  });
  canvas.addEventListener("blur", () => {
    isDown = false;
    showCursor();
  });
  showCursor();
  clear();
  return clear;
}
