/** The texts that a PNG file carries. */

const SIGNATURE = 0x89504e47;
const latin1 = new TextDecoder("latin1");
const utf8 = new TextDecoder();

/** Where the zero byte is that ends a text; the end of the bytes if there is none. */
const ended = (bytes, from) => {
  const end = bytes.indexOf(0, from);
  return end < 0 ? bytes.length : end;
};

/** The keyword and the text of an uncompressed tEXt or iTXt chunk. */
function textOf(kind, bytes) {
  const end = ended(bytes, 0);
  const keyword = latin1.decode(bytes.subarray(0, end));
  if (kind === "tEXt") return [keyword, latin1.decode(bytes.subarray(end + 1))];
  // Two bytes about compression, a language and a translated keyword.
  const translated = ended(bytes, end + 3);
  return [keyword, utf8.decode(bytes.subarray(ended(bytes, translated + 1) + 1))];
}

/** The texts of a file by their keywords; none if it is no PNG. */
export async function pngTexts(file) {
  const buffer = await file.arrayBuffer();
  const view = new DataView(buffer);
  const texts = {};
  if (buffer.byteLength < 8 || view.getUint32(0) !== SIGNATURE) return texts;
  for (let at = 8; at + 12 <= buffer.byteLength; at += 12 + view.getUint32(at)) {
    const length = view.getUint32(at);
    if (at + 12 + length > buffer.byteLength) break;
    const kind = latin1.decode(new Uint8Array(buffer, at + 4, 4));
    if (kind !== "tEXt" && kind !== "iTXt") continue;
    const [keyword, text] = textOf(kind, new Uint8Array(buffer, at + 8, length));
    texts[keyword] = text;
  }
  return texts;
}

/** The request that made a PNG of this server; null if it says none. */
export async function settingsIn(file) {
  const { weft } = await pngTexts(file);
  try {
    return weft ? JSON.parse(weft) : null;
  } catch {
    return null;
  }
}
