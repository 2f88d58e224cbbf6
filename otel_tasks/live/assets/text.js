/** Text, numbers, and elements. Whatever a service sends reaches the page as text or as a fixed attribute, never as markup. */

export const GLYPHS = { pending: "○", queued: "○", running: "▶", cancelling: "◐", completed: "✓", failed: "✕", cancelled: "⊘", ended: "·" };
export const TONES = { pending: "wait", queued: "wait", running: "run", cancelling: "cancel", completed: "ok", failed: "fail", cancelled: "gone", ended: "wait" };

export const $ = (id) => document.getElementById(id);

// Control characters and marks that turn the direction of the text around them; isolation alone would leave them in copies.
const UNSAFE = /[\u0000-\u001f\u007f-\u009f\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]/g;
export const clean = (text) => String(text ?? "").replace(UNSAFE, "\ufffd");

/** An element with its text or its children. */
export function make(tag, name, ...content) {
  const node = document.createElement(tag);
  if (name) node.className = name;
  node.append(...content.map((each) => (each instanceof Node ? each : clean(each))));
  return node;
}

export function draw(tag, attributes, ...content) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...content);
  return node;
}

/** Sets a text only if it differs: an unchanged node costs no layout. */
export function put(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

export function mark(node, attribute, value) {
  if (value === null || value === undefined) node.removeAttribute(attribute);
  else if (node.getAttribute(attribute) !== String(value)) node.setAttribute(attribute, value);
}

export function button(text, act, name = "") {
  const node = make("button", name, text);
  node.type = "button";
  node.addEventListener("click", act);
  return node;
}

/** A node as people call it: its host and its process. */
export const nodeName = (node) => clean(node).split("/").slice(0, 2).join("/");

const grouped = new Intl.NumberFormat("en-US");
export const number = (n) => grouped.format(n);
export const counted = (n, what) => `${number(n)} ${what}${n === 1 ? "" : "s"}`;
export const percent = (fraction) => `${Math.floor(100 * Math.min(1, Math.max(0, fraction)))} %`;

/** A duration in few characters: 0.4 s, 40 s, 12 m, 5 h, 3 d 4 h. */
export function duration(seconds) {
  const s = Math.max(0, seconds);
  if (s < 0.95) return s < 0.05 ? "0 s" : `${s.toFixed(1)} s`;
  if (s < 100) return `${Math.max(1, Math.floor(s))} s`;
  if (s < 6000) return `${Math.floor(s / 60)} m`;
  if (s < 172800) return `${Math.floor(s / 3600)} h`;
  return `${Math.floor(s / 86400)} d ${Math.floor((s % 86400) / 3600)} h`;
}

/** The same for short spans, such as the steps of a cancellation. */
export function fine(seconds) {
  if (seconds < 0.95) return `${(seconds * 1000).toFixed(seconds < 0.01 ? 1 : 0)} ms`;
  return seconds < 10 ? `${seconds.toFixed(1)} s` : duration(seconds);
}

export const wall = (time, { epoch }, options) => new Date((epoch + time) * 1000).toLocaleTimeString("en-GB", options);

/** "Pool.acquire at pool.py:88": the folder goes to the tooltip. */
export const line = (where) => (typeof where === "string" ? where : `${where.file}:${where.line}`);
export const short = (where) => line(where).replace(/^.*[/\\]/, "");

const CAUSES = {
  client_disconnect: "client disconnected",
  explicit: "cancelled on request",
  replaced: "replaced by a new task",
  foreign: "cancelled by other code",
};

/** Why something was cancelled, and by whom; the other requesters are groups around it, which stand above. */
export const causeOf = ({ kind, asked_by: by }) => (kind === "explicit" && by ? `requested by ${by}` : (CAUSES[kind] ?? kind.replaceAll("_", " ")));
export const because = (cause) => [causeOf(cause), cause.message].filter(Boolean).join(": ");
