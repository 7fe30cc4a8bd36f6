/** Talks to the server, with the key that the page asks for where one is needed. */

const key = document.getElementById("key");

/** The key that the user typed; empty if there is none. */
export const typedKey = () => key.querySelector("input").value;

/** Whether the server asked for a key. */
export const needsKey = () => !key.hidden;

export const headers = () => typedKey() ? { authorization: `Bearer ${typedKey()}` } : {};

/** A response that is no error; throws its sentence otherwise. */
export async function answered(response) {
  if (response.status === 401) key.hidden = false;
  if (response.ok) return response;
  const { error } = await response.json().catch(() => ({}));
  throw new Error(error?.message ?? `The server responded with status ${response.status}.`);
}

/** The server's catalog, once the server accepts requests; `say` is told what it waits for. */
export async function loaded(say) {
  for (let ready; !(ready = await fetch("/readyz")).ok;) {
    say((await ready.json()).error.message);
    await new Promise((resolve) => setTimeout(resolve, 1000));
  }
  say("");
  return (await answered(await fetch("/v1/catalog", { headers: headers() }))).json();
}

/** The server-sent events of a response, as [name, data]. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = "", read; !(read = await reader.read()).done;) {
    const blocks = (rest + read.value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const name = block.match(/^event: (.*)$/m)?.[1];
      if (name) yield [name, JSON.parse(block.match(/^data: (.*)$/m)[1])];
    }
  }
}
