/**
 * The list: one element per row, found again by its key.
 *
 * An update writes only what differs and moves only rows that changed places, so focus, selection, and scroll position
 * survive it. Rows out of sight cost no layout (`content-visibility` in page.css).
 */

import { $, GLYPHS, TONES, because, clean, duration, line, mark, nodeName, number, percent, put, short } from "./text.js";

const AGES = Math.log(1e6); // the axis of ages is logarithmic: 0.1 s to 28 hours on 84 pixels
const WIDTH = 84;
const HEIGHT = 28; // of a row, as in page.css
const MARGIN = 8; // rows

const xOf = (age) => Math.round(Math.min(1, Math.max(0, Math.log(Math.max(age, 0.1) / 0.1) / AGES)) * (WIDTH - 2));

/** What a task does now, in words. */
export function doing(task, now) {
  if (task.status === "cancelling") {
    const parts = [`cancelling ${duration(now - task.cancel_requested)}`, task.cause && because(task.cause), waits(task)];
    return parts.filter(Boolean).join(" · ");
  }
  if (task.status === "queued") return task.queue_position ? `waits for a slot, next but ${task.queue_position - 1}`.replace("next but 0", "next") : "waits for a slot";
  if (task.status === "pending") return "not started yet";
  if (task.retry_at) return `attempt ${task.attempt} failed, next in ${duration(task.retry_at - now)}`;
  if (task.next_run) return `next run in ${duration(task.next_run - now)}`;
  if (task.kind === "service" && !task.where) return "restarts soon";
  return waits(task);
}

function waits({ awaits, where, calls, group_id: group }) {
  if (awaits) return `waits for ${awaits.startsWith(`${group}/`) ? awaits.slice(group.length + 1) : awaits}`;
  return where ? `at ${short(where)}${calls ? `, in ${calls}` : ""}` : "";
}

/** How an ended task ended, in words. */
export function outcome(task, now) {
  const parts = [task.cancel_ignored ? "completed although cancelled" : task.status];
  if (task.status === "failed") parts.push([task.error_type, task.error].filter(Boolean).join(": "));
  if (task.cause) parts.push(because(task.cause));
  parts.push(`${duration(now - task.ended)} ago`);
  return parts.filter(Boolean).join(" · ");
}

export class List {
  constructor({ onOpen, onToggle, onMore }) {
    this.rows = new Map();
    this.entries = [];
    this.selected = null;
    this.body = $("rows");
    this.scroller = $("list");
    this.scroller.addEventListener("scroll", () => this.#catchUp(), { passive: true });
    this.template = $("row").content.firstElementChild;
    this.body.addEventListener("click", ({ target }) => {
      const row = this.rowOf(target);
      if (!row) return;
      this.select(row.key);
      const { kind } = row.entry;
      if (kind === "more") onMore(row.entry);
      else if (kind === "task" || kind === "ended") onOpen(row.entry);
      else onToggle(row.entry);
    });
    this.body.addEventListener("focusin", ({ target }) => {
      const row = this.rowOf(target);
      if (row && row.key !== this.selected) this.select(row.key, false);
    });
  }

  rowOf(node) {
    return this.rows.get(node.closest("[data-key]")?.dataset.key);
  }

  /** True while the order of the rows must not change: the pointer is over them, or the focus is on one. */
  get watched() {
    return this.body.matches(":hover") || this.body.contains(document.activeElement);
  }

  // --- update -----------------------------------------------------------------------------------

  show(entries, model) {
    const kept = this.#keepSelected(entries);
    this.model = model;
    const [first, last] = this.#inSight();
    if (kept.length !== this.entries.length || kept.some((entry, index) => entry.key !== this.entries[index].key)) this.#place(kept);
    this.entries = kept;
    kept.forEach((entry, index) => {
      const row = this.rows.get(entry.key);
      if (!row.entry || entry.kind === "more" || (index >= first && index <= last)) row.paint(entry, model);
    });
    this.#markSelected();
  }

  /** The rows in sight, and a few around them; the others are written when they come into sight. */
  #inSight() {
    const { scrollTop, clientHeight } = this.scroller;
    return [Math.floor(scrollTop / HEIGHT) - MARGIN, Math.ceil((scrollTop + clientHeight) / HEIGHT) + MARGIN];
  }

  #catchUp() {
    const [first, last] = this.#inSight();
    for (const entry of this.entries.slice(Math.max(0, first), last + 1)) {
      const row = this.rows.get(entry.key);
      if (row.entry !== entry) row.paint(entry, this.model);
    }
  }

  /** Adds, removes, and moves elements; those that keep their place are not touched. */
  #place(entries) {
    const focused = document.activeElement;
    const wanted = new Set(entries.map((entry) => entry.key));
    for (const [key, row] of this.rows) {
      if (wanted.has(key)) continue;
      row.node.remove();
      this.rows.delete(key);
    }
    let next = this.body.firstElementChild;
    entries.forEach(({ key }, index) => {
      let row = this.rows.get(key);
      if (!row) this.rows.set(key, (row = new Row(key, this.template.cloneNode(true))));
      if (row.index !== index) mark(row.node, "aria-rowindex", (row.index = index) + 2);
      if (row.node === next) next = next.nextElementSibling;
      else if (next && next.nextElementSibling === row.node) {
        const late = next; // one row has moved down: take it out of the way, not all others
        next = row.node.nextElementSibling;
        this.body.append(late);
      } else this.body.insertBefore(row.node, next);
    });
    mark($("list"), "aria-rowcount", entries.length + 1);
    if (focused !== document.activeElement && this.body.contains(focused)) focused.focus({ preventScroll: true });
  }

  /** The selected task stays in its place when it ends, until the selection moves on. */
  #keepSelected(entries) {
    const old = this.entries.findIndex((entry) => entry.key === this.selected);
    if (old < 0 || entries.some((entry) => entry.key === this.selected)) return entries;
    const entry = this.entries[old];
    if (entry.kind !== "task" && entry.kind !== "ghost") return entries;
    const before = entries.findIndex((each) => each.key === this.entries[old - 1]?.key);
    const place = before < 0 ? Math.min(old, entries.length) : before + 1;
    return [...entries.slice(0, place), { ...entry, kind: "ghost" }, ...entries.slice(place)];
  }

  /** Forgets the rows of another view: none of them is kept for being selected. */
  reset() {
    this.entries = [];
  }

  // --- selection --------------------------------------------------------------------------------

  get current() {
    return this.entries.find((entry) => entry.key === this.selected) ?? null;
  }

  select(key, focus = true) {
    this.selected = key;
    this.#markSelected();
    const node = this.rows.get(key)?.node;
    if (!focus || !node) return;
    node.focus({ preventScroll: true });
    node.scrollIntoView({ block: "nearest" });
  }

  /** Moves the selection by so many rows; without one, the first row is selected. */
  move(step) {
    const at = this.entries.findIndex((entry) => entry.key === this.selected);
    this.jump(at < 0 ? 0 : Math.max(0, Math.min(this.entries.length - 1, at + step)));
  }

  /** Selects the next row that passes `test`, from the top again after the last one; returns whether there is one. */
  find(test) {
    const at = this.entries.findIndex((entry) => entry.key === this.selected) + 1;
    const found = [...this.entries.slice(at), ...this.entries.slice(0, at)].find(test);
    if (found) this.select(found.key);
    return Boolean(found);
  }

  jump(index) {
    const entry = this.entries.at(index);
    if (entry) this.select(entry.key);
  }

  /** One row can be reached with Tab: the selected one, or the first. */
  #markSelected() {
    const row = this.rows.get(this.selected);
    const stop = row ?? this.rows.get(this.entries[0]?.key);
    if (this.stop !== stop && this.stop) this.stop.node.tabIndex = -1;
    if (stop) stop.node.tabIndex = 0;
    this.stop = stop;
    if (this.marked !== row && this.marked) mark(this.marked.node, "aria-selected", "false");
    if (row) mark(row.node, "aria-selected", "true");
    this.marked = row;
  }
}

class Row {
  constructor(key, node) {
    this.key = key;
    this.node = node;
    node.dataset.key = key;
    const [name, count, waiting, running, cancelling, age, progress] = node.children;
    const [tri, glyph, label, mult, host, prio, why] = name.children;
    Object.assign(this, { tri, glyph, label, mult, host, prio, why, counts: [count, waiting, running, cancelling], age, progress });
  }

  paint(entry, model) {
    const fresh = this.entry?.data !== entry.data || this.entry?.kind !== entry.kind || this.entry.open !== entry.open;
    this.entry = entry;
    if (fresh) {
      mark(this.node, "class", `row ${entry.kind}`);
      mark(this.node, "aria-level", entry.level);
      this.node.style.setProperty("--level", entry.level - 1);
      mark(this.node, "aria-expanded", entry.open);
      put(this.tri, entry.open === undefined ? "" : entry.open ? "▾" : "▸");
    }
    this[entry.kind](entry.data, model, fresh);
    if (model.nodes.size) this.#placed(entry, model);
  }

  /** With a fleet: which node it is on, and whether that is silent. */
  #placed({ kind, data, flat }, model) {
    const root = kind === "group" && data.parent === null;
    const silent = model.isSilent(data);
    mark(this.node, "class", `row ${kind}${root ? " root" : ""}${silent ? " silent" : ""}`);
    put(this.host, data.node && !root && (flat || kind === "task" || kind === "ended") ? nodeName(data.node) : "");
    if (!root) return;
    const known = model.nodes.get(data.node);
    put(this.label, nodeName(data.node));
    mark(this.label, "title", clean(data.node));
    const facts = [clean(data.name)];
    if (known?.version !== model.about.version) facts.push(`version ${clean(known?.version)}`);
    if (silent) facts.push(`silent for ${duration(model.now() - known.silent_since)}`);
    put(this.mult, facts.filter(Boolean).join(" · "));
  }

  group(group, model, fresh) {
    if (fresh) {
      put(this.label, clean(group.name));
      const facts = [];
      if (group.instances > 1) facts.push(`×${number(group.instances)}`);
      if (group.limit) facts.push(`limit ${number(group.limit)}`);
      put(this.mult, facts.join(" · "));
      this.#counts(group);
    }
    this.#ages(group, model.now());
  }

  class(each, model, fresh) {
    if (fresh) {
      put(this.label, clean(each.name));
      put(this.mult, `×${number(each.count)}`);
      put(this.why, each.kind === "task" ? "" : each.kind);
      this.#counts(each);
    }
    this.#ages(each, model.now());
  }

  task(task, model, fresh) {
    const now = model.now();
    if (fresh) {
      this.#named(task);
      mark(this.why, "title", task.where ? line(task.where) : null);
      this.#progress(task.progress);
    }
    put(this.why, clean(doing(task, now)));
    this.#age(now - task.created, TONES[task.status]);
  }

  ghost(task) {
    this.#named({ ...task, status: "ended" });
    put(this.why, "has ended");
  }

  ended(task, model, fresh) {
    if (fresh) {
      this.#named(task);
      this.#progress(null);
    }
    put(this.why, clean(outcome(task, model.now())));
    this.#age(task.ended - task.created, TONES[task.status]);
  }

  more({ shown, total }, model, fresh) {
    if (!fresh) return;
    put(this.label, `… ${number(total - shown)} more`);
    put(this.why, shown < 1000 ? "Enter or click: show more" : "filter to see them");
  }

  #named(task) {
    put(this.glyph, GLYPHS[task.status]);
    mark(this.glyph, "class", `glyph s-${TONES[task.status]}`);
    mark(this.glyph, "title", task.status);
    put(this.label, clean(task.name));
    mark(this.label, "title", clean(task.task_id));
    put(this.mult, clean(this.entry.flat ? task.group_id : this.entry.of));
    put(this.prio, task.priority === "NORMAL" ? "" : task.priority);
    mark(this.why, "class", `why s-${TONES[task.status]}`);
  }

  #counts({ count, queued, cancelling, progress }) {
    [count, queued, count - queued - cancelling, cancelling].forEach((n, index) => {
      put(this.counts[index], number(n));
      mark(this.counts[index], "class", `num${n ? (index === 3 ? " s-cancel" : "") : " zero"}`);
    });
    this.#progress(progress?.total && { ...progress, fraction: progress.done / progress.total });
  }

  #ages({ count, p50, p90, oldest }, now) {
    if (!count || oldest === null) return this.#clearAge();
    if (count === 1) return this.#age(now - oldest, "run");
    if (p50 === null) return this.#age(now - oldest, "run", "oldest ");
    this.#bar(xOf(now - p50), xOf(now - p90), xOf(now - oldest), "run");
    const ages = new Set([p50, p90, oldest].map((created) => duration(now - created)));
    put(this.age.lastChild, ages.size === 1 ? [...ages][0] : `${duration(now - p50)} · ${duration(now - p90)} · ${duration(now - oldest)}`);
  }

  #age(age, tone, word = "") {
    const at = xOf(age);
    this.#bar(at, at, at, tone);
    put(this.age.lastChild, word + duration(age));
  }

  #bar(p50, p90, oldest, tone) {
    mark(this.age, "class", `age t-${tone}`);
    const [, tail, box, mid] = this.age.firstChild.children;
    mark(tail, "x", p90);
    mark(tail, "width", Math.max(0, oldest - p90 + 2));
    mark(box, "x", p50);
    mark(box, "width", Math.max(0, p90 - p50));
    mark(mid, "x", p50);
  }

  #clearAge() {
    mark(this.age, "class", "age none");
    put(this.age.lastChild, "");
  }

  #progress(progress) {
    const fraction = progress?.fraction ?? null;
    mark(this.progress, "class", fraction === null ? "prog none" : "prog");
    put(this.progress.lastChild, fraction === null ? "" : percent(fraction));
    if (fraction !== null) mark(this.progress.firstChild.lastChild, "width", percent(fraction).replace(" ", ""));
    mark(this.progress, "title", progress?.message ? clean(progress.message) : null);
  }
}
