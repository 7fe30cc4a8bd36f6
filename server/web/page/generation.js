/** One generation over the server's stream of events. */

import { turn } from "./line.js";
import { answered, events, headers } from "./server.js";

/**
 * The events of a generation, as [name, data]; the last one is `completed`.
 *
 * @param request that is sent.
 * @param signal cancels it when it aborts.
 * @param onPlace is told how many generations of this page are before it.
 */
export async function* generation(request, signal, onPlace) {
  const leave = await turn(signal, onPlace);
  try {
    const response = await answered(await fetch("/v1/generate", {
      method: "POST",
      headers: { "content-type": "application/json", ...headers() },
      body: JSON.stringify({ ...request, stream: true }),
      signal,
    }));
    for await (const [name, data] of events(response)) {
      if (name === "error") throw new Error(data.error.message);
      yield [name, data];
      if (name === "completed") return;
    }
  } finally {
    leave();
  }
  throw new Error("The server closed the connection before the images were complete.");
}
