/** A live stream over a socket; docs/streaming.md describes the messages. */

import { equal } from "./fields.js";

const LONGEST_MEDIAN = 15;
const RATE_MS = 3000;
const SIGNS = { "+": "-", "/": "_", "=": "" };

const base64url = (text) =>
  btoa(String.fromCharCode(...new TextEncoder().encode(text))).replace(/[+/=]/g, (sign) => SIGNS[sign]);

const median = (values) => values.toSorted((one, other) => one - other)[values.length >> 1];

/** The fields that differ, where null stands for a field that is left out. */
function difference(before, after) {
  const names = new Set([...Object.keys(before), ...Object.keys(after)]);
  const changed = [...names].filter((name) => !equal(before[name], after[name]));
  return Object.fromEntries(changed.map((name) => [name, after[name] ?? null]));
}

/**
 * A stream, which opens at once.
 *
 * @param key the API key; empty for none.
 * @param heard what is called: `settings(answer)` when settings hold, `picture(blob, figures)`,
 *   `error(sentence, isHeld)`, where a stream that is held takes no frames until its settings
 *   change, and `closed(wasOpen, isExpected)`.
 */
export class LiveStream {
  #heard;
  #socket;
  #accepted = null;
  #asked = null;
  #refused = null;
  #wanted = null;
  #inFlight = 0;
  #sent = new Map();
  #number = 0;
  #lastSent = 0;
  #header = null;
  #latencies = [];
  #arrivals = [];
  #firstOfSettings = 0;
  #isHeld = false;
  #wasOpen = false;
  #isExpected = false;

  constructor(key, heard) {
    this.#heard = heard;
    const url = new URL("/v1/stream", location.href);
    url.protocol = url.protocol.replace("http", "ws");
    url.hash = "";
    this.#socket = new WebSocket(url, ["weft.stream", ...(key ? [`weft.key.${base64url(key)}`] : [])]);
    this.#socket.binaryType = "blob";
    this.#socket.onopen = () => {
      this.#wasOpen = true;
      this.#ask();
    };
    this.#socket.onmessage = ({ data }) => typeof data === "string" ? this.#told(JSON.parse(data)) : this.#shown(data);
    this.#socket.onclose = () => heard.closed(this.#wasOpen, this.#isExpected);
  }

  /** Asks for settings, once the server has answered the ones before. */
  want(settings) {
    this.#wanted = settings;
    this.#ask();
  }

  /** Milliseconds until the next frame may leave; null if it must wait for a picture. */
  get delay() {
    if (!this.#accepted || this.#isHeld || this.#sent.size >= this.#inFlight) return null;
    if (!this.#sent.size) return 0;
    // Spread evenly, so that each is at another stage; none is to wait in the server for its turn.
    if (!this.#latencies.length) return null;
    return Math.max(0, this.#lastSent + median(this.#latencies) / this.#inFlight - performance.now());
  }

  /** Sends a frame. */
  send(blob) {
    this.#lastSent = performance.now();
    this.#sent.set(this.#number++, this.#lastSent);
    this.#socket.send(blob);
  }

  close() {
    this.#isExpected = true;
    this.#socket.close();
  }

  #ask() {
    if (this.#asked || !this.#wasOpen || equal(this.#wanted, this.#refused)) return;
    const changed = difference(this.#accepted ?? {}, this.#wanted);
    if (this.#accepted && !Object.keys(changed).length) return;
    this.#asked = this.#wanted;
    this.#socket.send(JSON.stringify(changed));
  }

  #told(message) {
    if ("settings" in message) {
      this.#accepted = this.#asked;
      this.#settled(null);
      this.#inFlight = message.settings.in_flight;
      this.#firstOfSettings = this.#number;
      this.#isHeld = false;
      this.#heard.settings(message);
    } else if ("error" in message) {
      const { message: sentence, param } = message.error;
      const isAboutSettings = this.#asked !== null && !("source" in message);
      if (isAboutSettings) this.#settled(this.#asked);
      this.#sent.delete(message.source);
      const wasHeld = this.#isHeld;
      // Every frame would be refused for the same field, such as its size; others are of older settings.
      this.#isHeld ||= message.source >= this.#firstOfSettings && param !== null && param !== "frame";
      if (isAboutSettings || !wasHeld) this.#heard.error(sentence, this.#isHeld);
    } else {
      this.#header = message;
    }
  }

  #settled(refused) {
    this.#refused = refused;
    this.#asked = null;
    this.#ask();
  }

  #shown(blob) {
    const { source, dropped } = this.#header;
    const now = performance.now();
    this.#latencies = [...this.#latencies, now - this.#sent.get(source)].slice(-LONGEST_MEDIAN);
    // Those before it were dropped for newer ones.
    for (const earlier of [...this.#sent.keys()]) if (earlier <= source) this.#sent.delete(earlier);
    this.#arrivals = [...this.#arrivals, now].filter((at) => now - at < RATE_MS);
    const spanned = now - this.#arrivals[0];
    this.#heard.picture(blob, {
      fps: spanned ? (1000 * (this.#arrivals.length - 1)) / spanned : null,
      latency: median(this.#latencies),
      dropped,
    });
  }
}
