/** A line of generations: browsers open six connections to a server, and one of them must stay free. */

const MOST = 5;
const waiting = [];
let open = 0;

const tellPlaces = () => waiting.forEach(({ onPlace }, index) => onPlace(index));

function leave() {
  open -= 1;
  const next = waiting.shift();
  if (!next) return;
  open += 1;
  next.go();
  tellPlaces();
}

/**
 * Waits for a turn.
 *
 * @param signal ends the waiting when it aborts.
 * @param onPlace is told how many are before this one, whenever that changes.
 * @returns a function to call when the turn is over.
 */
export async function turn(signal, onPlace) {
  if (open < MOST) {
    open += 1;
    return leave;
  }
  await new Promise((go, fail) => {
    const place = { go, onPlace };
    waiting.push(place);
    onPlace(waiting.length - 1);
    signal.addEventListener("abort", () => {
      const index = waiting.indexOf(place);
      if (index < 0) return;
      waiting.splice(index, 1);
      tellPlaces();
      fail(signal.reason);
    });
  });
  return leave;
}
