/** The gallery's pictures in the browser's own database. */

const MOST_BYTES = 64 * 2 ** 20;
const MOST_PICTURES = 500;
const NAME = "weft";
const PICTURES = "pictures";

const done = (asked) => new Promise((resolve, reject) => {
  asked.onsuccess = () => resolve(asked.result);
  asked.onerror = () => reject(asked.error);
});

const opened = (() => {
  const asked = indexedDB.open(NAME, 1);
  asked.onupgradeneeded = () => asked.result.createObjectStore(PICTURES, { keyPath: "id" });
  return done(asked);
})();
// Whoever uses it hears of the failure; without this line the browser would report it, too.
opened.catch(() => {});

const store = async (mode) => (await opened).transaction(PICTURES, mode).objectStore(PICTURES);

const bytesOf = ({ blob, request }) => blob.size + JSON.stringify(request).length;

/** All kept pictures, the oldest first; none where the browser keeps nothing. */
export async function kept() {
  try {
    return await done((await store("readonly")).getAll());
  } catch {
    return [];
  }
}

/** Keeps a picture, where the browser lets it; the oldest make room. Gives the ids of those. */
export async function keep(picture) {
  try {
    await done((await store("readwrite")).put(picture));
    const all = await kept();
    let bytes = all.reduce((sum, one) => sum + bytesOf(one), 0);
    let most = all.length;
    const dropped = [];
    for (const one of all) {
      if (bytes <= MOST_BYTES && most <= MOST_PICTURES) break;
      bytes -= bytesOf(one);
      most -= 1;
      dropped.push(one.id);
    }
    await forget(...dropped);
    return dropped;
  } catch {
    return [];
  }
}

/** Removes pictures by their ids. */
export async function forget(...ids) {
  try {
    const pictures = await store("readwrite");
    await Promise.all(ids.map((id) => done(pictures.delete(id))));
  } catch {
    // Nothing is kept where nothing can be removed.
  }
}
