/**
 * The feed: one event stream for all visible tabs of a browser, as events in an unbroken sequence.
 *
 * The tab that holds a Web Lock reads the stream and passes each event on over a BroadcastChannel: six streams would take
 * all connections that HTTP/1.1 has to one origin. A hidden tab lets go of both. Without Web Locks (plain HTTP on another
 * host than localhost) or EventSource, each tab polls.
 */

const SILENT = 5; // seconds without an event after which the data is stale
const DEAD = 10; // seconds after which the stream is opened again: a half-open connection reports no error
const MAX_EXPANDED = 20;
const MAX_PANELS = 10;

const later = (seconds, act) => setTimeout(act, seconds * 1000);
const sequence = (id) => Number(id.slice(id.lastIndexOf(":") + 1));
const instanceOf = (id) => id.slice(0, id.lastIndexOf(":"));

const MISDIRECTED = 421;
let shown; // the instance that the page shows

/** Fetches JSON; an error carries the server's message, and `status` and `code`. */
export async function get(path, options) {
  const response = await fetch(path, { cache: "no-store", ...options });
  const data = await response.json().catch(() => null);
  if (response.ok && data) return data;
  const answering = response.headers.get("Otel-Tasks-Instance");
  if (shown && answering && answering !== shown) {
    throw Object.assign(new Error("Another process of the service answered, which does not have this task. Try again."), { status: MISDIRECTED });
  }
  const error = new Error(data?.error?.message ?? `the server answered ${response.status}`);
  throw Object.assign(error, { status: response.status, code: data?.error?.code, retry: Number(response.headers.get("Retry-After")) });
}

function viewerName() {
  const made = crypto.getRandomValues(new Uint32Array(4)).join("-");
  try {
    return (localStorage["otel-tasks-viewer"] ??= made);
  } catch {
    return made; // storage is blocked
  }
}

export class Feed {
  /** `onEvent(type, data)` gets the events in order, `onState({ state, seconds, message })` what is known of the connection. */
  constructor(onEvent, onState) {
    this.onEvent = onEvent;
    this.onState = onState;
    this.id = null; // of the last event that was delivered
    this.tab = Math.random().toString(36).slice(2);
    this.viewer = viewerName();
    this.wanted = { expand: [], task: null };
    this.others = new Map(); // what other tabs want
    this.failures = 0;
    this.heard = performance.now();
    this.trouble = "";
    setInterval(() => this.#watch(), 1000);
    document.addEventListener("visibilitychange", () => this.#turn());
    addEventListener("pagehide", () => this.#stop());
    addEventListener("pageshow", (event) => event.persisted && this.#turn());
    this.#turn();
  }

  /** Names the rows whose tasks the page shows, and the task of its panel. */
  want(expand, task) {
    if (`${expand} ${task}` === `${this.wanted.expand} ${this.wanted.task}`) return;
    this.wanted = { expand, task };
    this.#tell({ want: this.wanted });
    this.#reopenSoon();
  }

  /** Starts again, with a snapshot and all tasks of the rows that are shown. */
  restart() {
    this.#refresh();
    this.#tell({ want: this.wanted });
    this.#reopenSoon();
  }

  // --- which tab reads --------------------------------------------------------------------------

  #turn() {
    const on = document.visibilityState === "visible";
    if (on === Boolean(this.running)) return;
    if (on) this.#start();
    else this.#stop();
  }

  #start() {
    this.running = new AbortController();
    this.failures = 0;
    this.#refresh();
    if (!window.EventSource || !navigator.locks) {
      this.#poll(this.running.signal);
      return;
    }
    const name = `otel-tasks ${location.pathname}`;
    this.channel = new BroadcastChannel(name);
    this.channel.onmessage = ({ data }) => this.#hear(data);
    this.#tell({ want: this.wanted });
    navigator.locks
      .request(name, { signal: this.running.signal }, () => new Promise((release) => {
        this.release = release;
        this.#tell({ who: true });
        this.#open();
      }))
      .catch(() => {}); // aborted: the tab was hidden while it waited for the lock
  }

  #stop() {
    this.#tell({ want: null });
    this.#close();
    this.running?.abort();
    this.release?.();
    this.channel?.close();
    this.running = this.release = this.channel = null;
  }

  #tell(message) {
    this.channel?.postMessage({ tab: this.tab, ...message });
  }

  #hear({ tab, want, who, event, data }) {
    if (event) this.#take(event, data);
    if (who) this.#tell({ want: this.wanted });
    if (want === undefined) return;
    if (want) this.others.set(tab, want);
    else this.others.delete(tab);
    if (this.release) this.#reopenSoon();
  }

  // --- reading ----------------------------------------------------------------------------------

  #query(more) {
    const query = new URLSearchParams({ viewer: this.viewer, ...more });
    if (this.id) query.set("after", this.id);
    const wanted = [this.wanted, ...this.others.values()];
    const expanded = new Set(wanted.flatMap(({ expand }) => expand));
    const tasks = new Set(wanted.map(({ task }) => task).filter(Boolean));
    for (const key of [...expanded].slice(0, MAX_EXPANDED)) query.append("expand", key);
    for (const id of [...tasks].slice(0, MAX_PANELS)) query.append("task", id);
    return `v1/events?${query}`;
  }

  #reopenSoon() {
    if (!this.release) return;
    clearTimeout(this.timer);
    this.timer = later(0.1, () => this.#open());
  }

  #close() {
    clearTimeout(this.timer);
    this.source?.close();
    this.source = null;
  }

  #open() {
    this.#close();
    if (!this.release) return;
    const source = (this.source = new EventSource(this.#query()));
    this.opened = performance.now();
    for (const type of ["snapshot", "delta", "rows", "task", "resync", "bye"]) {
      source.addEventListener(type, (event) => {
        if (this.source !== source) return;
        const data = JSON.parse(event.data);
        this.failures = 0;
        if (type === "bye") return this.#again(data.reason === "lifetime" ? 0 : 1 + Math.random());
        this.#tell({ event: type, data });
        this.#take(type, data);
      });
    }
    source.onerror = () => this.source === source && this.#fail();
  }

  #again(seconds) {
    this.#close();
    this.timer = later(seconds, () => this.#open());
  }

  /** An EventSource does not say why it failed, and a fetch does. */
  async #fail() {
    this.#close();
    const wait = Math.min(10, 2 ** this.failures++ / 2) * (0.75 + Math.random() / 2);
    this.timer = later(wait, () => this.#open());
    if (this.failures > 1) await this.#refresh();
  }

  /** Fetches the snapshot: at the start, after a gap, and to learn what is wrong. */
  async #refresh() {
    if (this.fetching) return;
    this.fetching = true;
    try {
      this.#take("snapshot", await get("v1/snapshot"));
    } catch (error) {
      this.#complain(error);
    } finally {
      this.fetching = false;
    }
  }

  #complain(error) {
    this.trouble = error.status ? error.message : "the server does not answer";
    this.denied = error.status === 401 || error.status === 403;
    this.#watch();
  }

  async #poll(signal) {
    while (!signal.aborted) {
      let pause = 1000;
      try {
        const answer = await get(this.#query({ poll: "1" }), { signal });
        for (const { event, data } of answer.events) this.#take(event, data);
        pause = answer.retry;
      } catch (error) {
        if (signal.aborted) return;
        this.#complain(error);
        pause = 1000 * (error.retry || 2);
      }
      await new Promise((resume) => setTimeout(resume, pause));
    }
  }

  // --- what comes -------------------------------------------------------------------------------

  #take(type, data) {
    this.heard = performance.now();
    this.trouble = "";
    this.denied = false;
    if (type === "delta" && data.base !== this.id) {
      const known = this.id && instanceOf(this.id) === instanceOf(data.id) && sequence(data.id) <= sequence(this.id);
      if (!known) this.#refresh();
      return;
    }
    if (type === "snapshot" || type === "delta") {
      this.id = data.id;
      shown = instanceOf(data.id);
    }
    if (type === "resync") this.id = null;
    else this.onEvent(type, data);
    this.#watch();
  }

  #watch() {
    const seconds = (performance.now() - this.heard) / 1000;
    const stale = seconds > SILENT || this.denied;
    const state = stale ? "stale" : this.id ? "live" : "connecting";
    this.onState({ state: this.trouble && !this.id ? "stale" : state, seconds, message: this.trouble });
    if (this.source && seconds > DEAD && performance.now() - this.opened > DEAD * 1000) this.#open();
  }
}
