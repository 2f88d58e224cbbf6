/** Bars of live and recently ended tasks on one axis. A live bar has an open end, and a cause is marked where it struck. */

import { $, GLYPHS, TONES, because, clean, draw, duration, fine, make, mark, put, wall } from "./text.js";
import { keyOf } from "./model.js";

const WINDOWS = [20, 60, 120, 240, 600, 1200, 3600, 14400, 86400, 345600]; // seconds; a quarter of each is easy to read
const MOST = 0.8; // the part of the bars whose start the window has to show

const endOf = (task, now) => task.ended ?? now;
const causeAt = (task) => task.cancel_requested ?? task.cause?.at ?? null;

/** The shortest window that shows the start of most bars. */
function spanOf(tasks, now) {
  const ages = tasks.map((task) => now - task.created).sort((a, b) => a - b);
  const needed = ages[Math.floor((ages.length - 1) * MOST)] ?? 60;
  return WINDOWS.find((span) => span >= needed) ?? needed;
}

export class Timeline {
  constructor({ model, onOpen }) {
    Object.assign(this, { model, onOpen });
    this.node = $("timeline");
    this.axis = make("div", "axis");
    this.bars = make("div", "bars");
    this.empty = make("p", "empty");
    this.node.append(this.axis, this.bars, this.empty);
    this.rows = new Map();
    this.span = 60;
  }

  /** Shows tasks, a request's together; `name` says whose they are. There may be no answer yet, or none of a node. */
  show(tasks, name, { asking, silent } = {}) {
    const now = this.model.now();
    this.node.hidden = false;
    this.empty.hidden = tasks.length > 0;
    const none = silent ? `No answer yet: what runs in ${clean(name)} is not known.` : `No task of ${clean(name)} is live, and none is remembered.`;
    put(this.empty, asking ? "…" : none);
    this.axis.hidden = tasks.length === 0;
    const needed = spanOf(tasks, now);
    if (needed > this.span || needed < this.span / 4) this.span = needed;
    this.#ticks(now);
    const wanted = [];
    for (const [group, members] of this.#groups(tasks)) {
      const alone = members.length === 1;
      if (!alone) {
        const row = this.#row(`group ${group}`, () => this.#head(group));
        put(row.lastChild, this.#causeOf(members));
        wanted.push(row);
      }
      for (const task of members) wanted.push(this.#bar(task, now, alone ? group : ""));
    }
    for (const [key, node] of this.rows) {
      if (wanted.includes(node)) continue;
      node.remove();
      this.rows.delete(key);
    }
    wanted.forEach((node, index) => {
      if (this.bars.children[index] !== node) this.bars.insertBefore(node, this.bars.children[index] ?? null);
    });
  }

  hide() {
    this.node.hidden = true;
  }

  #groups(tasks) {
    const groups = new Map();
    // What still runs is what people look for: it comes before what has ended.
    const sorted = [...tasks].sort((a, b) => Boolean(a.ended) - Boolean(b.ended) || a.created - b.created || a.task_id.localeCompare(b.task_id, "en", { numeric: true }));
    for (const task of sorted) {
      const group = task.group_id ?? "";
      if (!groups.has(group)) groups.set(group, []);
      groups.get(group).push(task);
    }
    return groups;
  }

  #causeOf(members) {
    const first = members.filter(causeAt).sort((a, b) => causeAt(a) - causeAt(b))[0];
    return first ? `⊘ ${clean(because(first.cause))}, ${wall(causeAt(first), this.model)}` : "";
  }

  #head(group) {
    return make("div", "bar-group", make("bdi", "", group), make("span", "s-gone"));
  }

  #row(key, build) {
    let row = this.rows.get(key);
    if (!row) this.rows.set(key, (row = build()));
    return row;
  }

  #ticks(now) {
    const ticks = [0, 0.25, 0.5, 0.75].map((part) => make("span", "", `${duration((1 - part) * this.span)} ago`));
    const says = ticks.map((tick) => tick.textContent).join();
    if (this.says === says) return;
    this.says = says;
    this.axis.replaceChildren(make("span"), make("div", "ticks", ...ticks, make("span", "now", "now")), make("span"));
  }

  #bar(task, now, group) {
    const key = keyOf(task);
    const row = this.#row(key, () => {
      const node = make("button", "bar", make("span", "", make("span", "glyph"), make("bdi"), make("bdi", "mute")), draw("svg", { height: 18, width: "100%" }), make("span", "mono mute"));
      node.type = "button";
      node.addEventListener("click", () => node.task && this.onOpen(node.task));
      return node;
    });
    row.task = task;
    const [label, picture, time] = row.children;
    put(label.firstChild, GLYPHS[task.status]);
    mark(label.firstChild, "class", `glyph s-${TONES[task.status]}`);
    put(label.children[1], clean(task.name));
    put(label.lastChild, clean(` ${group.slice(Math.max(0, group.lastIndexOf("#")))}`));
    put(time, task.ended === undefined ? duration(now - task.created) : fine(task.ended - task.created));
    picture.replaceChildren(...this.#parts(task, now));
    const cause = causeAt(task) === null ? "" : `, ${because(task.cause)} at ${wall(causeAt(task), this.model)}`;
    mark(row, "title", clean(`${task.task_id}: ${task.status}${cause}`));
    return row;
  }

  #parts(task, now) {
    const x = (time) => Math.max(0, 100 - ((now - time) / this.span) * 100);
    const end = endOf(task, now);
    const cause = causeAt(task);
    const started = task.started ?? (task.status === "queued" || task.status === "pending" ? end : task.created);
    const parts = [];
    const piece = (from, to, name) => {
      const [left, right] = [x(from), x(to)];
      if (right > 0 && right > left) parts.push(draw("rect", { x: `${left.toFixed(2)}%`, width: `${Math.max(0.15, right - left).toFixed(2)}%`, y: 4, height: 10, class: name }));
    };
    piece(task.created, Math.min(started, end), "b-wait");
    piece(started, cause ? Math.max(started, Math.min(cause, end)) : end, `b-${task.ended === undefined ? "run" : TONES[task.status]}`);
    if (cause && end > cause) piece(Math.max(cause, task.created), end, "b-cancel");
    if (now - task.created > this.span && x(end) > 0) parts.push(draw("text", { x: 0, y: 13, class: "beyond" }, "‹"));
    if (task.ended === undefined) parts.push(draw("text", { x: "100%", dx: -3, y: 14, class: `open s-${TONES[task.status]}` }, "▸"));
    if (cause && x(cause) > 0) parts.push(draw("text", { x: `${x(cause).toFixed(2)}%`, y: 13, class: "struck", "text-anchor": "middle" }, "◆"));
    return parts;
  }
}

