/** The head of the page: who this is, how fresh it is, counters with their last minute, and warnings. */

import { $, button, clean, counted, draw, duration, fine, make, mark, number, put, short } from "./text.js";

const SPAN = 60; // seconds that a sparkline shows
const RATE = 5; // seconds over which a rate is taken: one second alone jumps
const [TIME, , , , COMPLETED] = [0, 1, 2, 3, 4]; // columns of a sample

const COUNTERS = [
  { name: "running", glyph: "▶", tone: "run", column: 1 },
  { name: "waiting for a slot", glyph: "○", tone: "wait", column: 2 },
  { name: "cancelling", glyph: "◐", tone: "cancel", column: 3 },
  { name: "completed", glyph: "✓", tone: "ok", column: COMPLETED, rate: true },
  { name: "failed", glyph: "✕", tone: "fail", column: 5, rate: true },
  { name: "cancelled", glyph: "⊘", tone: "gone", column: 6, rate: true },
];

/** What stands in bold, and what follows it. */
const WARNINGS = {
  cancelling: ({ count, min_age: age }) => [number(count), `cancelling for more than ${duration(age)}`],
  unstarted: ({ count, min_age: age }) => [number(count), `not started after ${duration(age)}`],
  waiting: ({ count, where, estimated }) => [`${estimated ? "about " : ""}${number(count)}`, "waiting at ", make("span", "mono", short(where))],
  blocked: ({ count, seconds }) => ["event loop blocked", count > 1 ? `${number(count)} times, up to ${fine(seconds)}` : `for ${fine(seconds)}`],
  outlived: ({ count }) => [number(count), "outlived the request that started them"],
  ignored: ({ count }) => [number(count), "completed although cancelled"],
};

const perSecond = (rate) => number(rate < 10 ? Math.round(rate * 10) / 10 : Math.round(rate));

/** The values of a counter over time; of one that counts up, its rate. */
function series(samples, { column, rate }) {
  if (!rate) return samples.map((sample) => [sample[TIME], sample[column]]);
  return samples.slice(1).map((sample, index) => {
    const before = samples[Math.max(0, index + 1 - RATE)];
    return [sample[TIME], (sample[column] - before[column]) / Math.max(0.001, sample[TIME] - before[TIME])];
  });
}

function spark(values, end) {
  const top = Math.max(1, ...values.map(([, value]) => value));
  return values
    .filter(([time]) => end - time <= SPAN)
    .map(([time, value]) => `${(92 - ((end - time) / SPAN) * 92).toFixed(1)},${(17 - (value / top) * 15).toFixed(1)}`)
    .join(" ");
}

export class Summary {
  /** `onList(query, label)` shows the tasks behind a warning; `onChange()` when one is silenced. */
  constructor({ onList, onChange }) {
    Object.assign(this, { onList, onChange });
    this.silenced = new Set(recall());
    this.counters = COUNTERS.map((counter) => {
      const value = make("b", "num");
      const line = draw("polyline", { fill: "none", stroke: "currentColor", "stroke-width": 1.5 });
      const picture = draw("svg", { width: 92, height: 18, role: "img", "aria-label": `${counter.name}, the last ${SPAN} s` }, line);
      $("counts").append(make("div", `count s-${counter.tone}`, value, make("span", "", counter.name), picture));
      return { ...counter, value, line };
    });
  }

  show(model) {
    const { about, samples, stats } = model;
    const silent = [...model.nodes.values()].filter((node) => model.isSilent(node)).length;
    const nodes = model.nodes.size && `${counted(model.nodes.size, "node")}${silent ? `, ${number(silent)} silent` : ""}`;
    put($("host"), clean([about.service, nodes, about.host, `pid ${about.pid}`].filter(Boolean).join(" · ")));
    put($("may"), stats.closed ? "shut down" : about.actions.includes("cancel") ? "can cancel" : "read-only");
    $("may").hidden = false;
    const end = samples.length ? samples.at(-1)[TIME] : 0;
    const live = [stats.running, stats.queued, stats.cancelling];
    this.counters.forEach((counter, index) => {
      const values = series(samples, counter);
      const rate = values.length ? values.at(-1)[1] : 0;
      put(counter.value, `${counter.glyph} ${counter.rate ? `${perSecond(rate)}/s` : number(live[index])}`);
      mark(counter.line, "points", spark(values, end));
    });
    this.#warn(model);
    const trouble = model.warnings.filter(({ kind }) => !this.silenced.has(kind)).length;
    document.title = `${trouble ? `! ${trouble} · ` : ""}Tasks · ${clean(about.service ?? about.host)}`;
  }

  /** Warnings are few, and replaced only if what they say has changed: a click must not miss one. */
  #warn(model) {
    const shown = model.warnings.filter(({ kind }) => !this.silenced.has(kind));
    const hidden = model.warnings.length - shown.length;
    const state = JSON.stringify([shown, hidden, shown.map(({ since }) => since && Math.floor((model.now() - since) / 10))]);
    if (state === this.warned) return;
    this.warned = state;
    const focused = document.activeElement.dataset?.warning;
    const nodes = shown.map((warning) => this.#warning(warning, model.now()));
    if (hidden) nodes.push(button(`${counted(hidden, "warning")} silenced: show`, () => this.#silence(null), "plain"));
    $("warnings").replaceChildren(...nodes);
    if (focused) $("warnings").querySelector(`[data-warning="${CSS.escape(focused)}"]`)?.focus();
  }

  #warning(warning, now) {
    const [bold, ...says] = (WARNINGS[warning.kind] ?? (({ count, kind }) => [number(count), kind]))(warning);
    const text = make("span", "", make("b", "", `! ${bold}`), " ", ...says);
    if (warning.since !== null && warning.since !== undefined) text.append(make("small", "", ` ${this.#age(warning, now)}`));
    const open = make(warning.query ? "button" : "span", "open", text);
    if (warning.query) open.addEventListener("click", () => this.onList(warning.query, clean(says.map((each) => each.textContent ?? each).join(""))));
    const hush = button("✕", () => this.#silence(warning.kind), "hush");
    hush.title = "silence this kind of warning in this browser";
    mark(hush, "aria-label", `Silence: ${text.textContent}`);
    open.dataset.warning = warning.key;
    return make("span", "warning", open, hush);
  }

  #age({ kind, since }, now) {
    const age = duration(now - since);
    return kind === "blocked" ? `${age} ago` : `oldest ${age}`;
  }

  #silence(kind) {
    if (kind) this.silenced.add(kind);
    else this.silenced.clear();
    remember([...this.silenced]);
    this.onChange();
  }
}

const STORE = "otel-tasks-silenced";

function recall() {
  try {
    return JSON.parse(localStorage[STORE] ?? "[]");
  } catch {
    return []; // storage is blocked, or holds something else
  }
}

function remember(kinds) {
  try {
    localStorage[STORE] = JSON.stringify(kinds);
  } catch {
    // Storage is blocked: it lasts as long as the page.
  }
}
