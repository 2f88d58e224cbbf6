/** The panel next to the list: everything that is known of one task. It stays when the task ends or leaves the list. */

import { $, GLYPHS, TONES, button, causeOf, clean, duration, fine, line, make, mark, nodeName, number, percent, put, short, wall } from "./text.js";
import { get } from "./feed.js";
import { doing, outcome } from "./rows.js";

const capital = (text) => text[0].toUpperCase() + text.slice(1);

async function copy(text, node) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const box = make("textarea", "unseen"); // no clipboard on plain HTTP
    box.value = text;
    document.body.append(box);
    box.select();
    document.execCommand("copy");
    box.remove();
    node.focus();
  }
  const before = node.textContent;
  put(node, "copied");
  setTimeout(() => put(node, before), 1200);
}

export class Panel {
  /** `onLoad()` when the task is another one that the stream should send, `mayCancel()` is false while the page shows old data. */
  constructor({ model, onShow, onList, onTimeline, onCancel, onClose, onLoad, mayCancel }) {
    Object.assign(this, { model, onShow, onList, onTimeline, onLoad, mayCancel });
    this.node = $("panel");
    this.id = null;
    this.parts = new Map();
    this.title = make("h2");
    this.path = make("div", "path mono");
    this.body = make("div");
    this.cancel = button("Cancel…", () => this.details && onCancel(this.details.task), "danger");
    this.cancel.append(make("kbd", "", "x"));
    const shut = button("✕", onClose, "shut");
    mark(shut, "aria-label", "Close the panel");
    this.actions = make("div", "actions", this.cancel, button("Copy id", ({ currentTarget }) => copy(this.details?.task.task_id ?? this.id, currentTarget)));
    this.node.append(shut, this.title, this.path, this.body, this.actions);
  }

  show(task) {
    if (this.id === task.id && this.details) return;
    this.id = task.id;
    this.task = task;
    this.details = null;
    this.missing = "";
    this.strange = false;
    this.node.hidden = false;
    this.parts.clear();
    this.body.replaceChildren();
    this.#head(task);
    put(this.path, "");
    this.cancel.disabled = true;
    return this.refresh();
  }

  hide() {
    this.id = this.details = null;
    this.node.hidden = true;
    this.onLoad();
  }

  /** The id of the task that the stream should send: that of a live task, also of one that another process does not know. */
  get watched() {
    if (!this.details) return this.strange ? this.id : null;
    return this.details.state === "live" && !this.missing ? this.details.task.id : null;
  }

  /** Fetches the task; what changes afterwards comes with the stream. */
  async refresh() {
    const id = this.id;
    if (!id) return;
    try {
      const details = await get(`v1/tasks/${encodeURIComponent(id)}`);
      if (this.id === id) this.#load(details);
    } catch (error) {
      if (this.id !== id) return;
      this.strange = error.status === 421;
      if (error.status === 404) this.#forget();
      else this.missing = this.strange ? error.message : "";
    }
    this.onLoad();
    this.update();
  }

  /** Takes the task from the stream, which does not know what this viewer may do. */
  take(details) {
    const { state, task } = details;
    if (task.id !== (this.details?.task.id ?? this.id)) return;
    if (state === "forgotten") this.#forget();
    else this.#load({ ...details, can: state === "live" ? (this.details?.can ?? this.model.about?.actions ?? []) : [] });
    this.onLoad();
    this.update();
  }

  #load(details) {
    Object.assign(this, { details, task: details.task, missing: "" });
  }

  #forget() {
    this.missing = "This task has ended and is no longer remembered.";
    if (this.details) this.details = { ...this.details, can: [] };
  }

  /** Writes what has changed. */
  update(fresh = this.mayCancel()) {
    if (!this.id) return;
    this.#part("missing", this.missing, () => this.missing && [make("p", "why", this.missing)]);
    if (!this.details) return;
    const { task, frames, awaited, waiters, cause_chain: chain, siblings, metadata, path, can } = this.details;
    const ended = this.details.state === "ended";
    this.#head(task);
    put(this.path, clean(path.join(" / ")));
    this.#part("facts", [task, awaited, waiters, Math.floor(this.model.now())], () => [this.#facts(task, awaited, waiters, ended)]);
    this.#part("frames", [frames, ended], () => !ended && this.#frames(task, frames));
    this.#part("chain", chain, () => chain.length && this.#chain(chain));
    this.#part("siblings", siblings, () => this.#siblings(siblings, task));
    this.#part("metadata", metadata, () => Object.keys(metadata ?? {}).length && this.#metadata(metadata));
    this.cancel.hidden = !can.includes("cancel");
    this.cancel.disabled = !fresh || this.model.isSilent(task);
    put(this.cancel.firstChild, task.status === "cancelling" ? "Cancel again…" : "Cancel…");
  }

  #head(task) {
    const status = task.status ?? "ended";
    if (this.title.dataset.of === `${task.id ?? task.n} ${status}`) return;
    this.title.dataset.of = `${task.id ?? task.n} ${status}`;
    this.title.replaceChildren(make("span", `s-${TONES[status]}`, GLYPHS[status]), " ", make("bdi", "", task.name ?? "…"));
  }

  /** A part of the panel, replaced only if its data has changed: a link in another part keeps its focus. */
  #part(name, data, build) {
    const state = JSON.stringify(data) ?? "";
    let part = this.parts.get(name);
    if (!part) {
      part = { node: make("section") };
      this.parts.set(name, part);
      this.body.append(part.node);
    }
    if (part.state === state) return;
    part.state = state;
    const built = build() || [];
    if (name === "facts" && part.node.contains(document.activeElement) && part.node.firstChild) return this.#renew(part.node.firstChild, built[0]);
    part.node.replaceChildren(...built);
  }

  /** While the focus is on a link among the facts, only the texts are replaced. */
  #renew(old, made) {
    if (old.children.length !== made.children.length) return;
    [...old.children].forEach((child, index) => {
      if (!child.contains(document.activeElement)) child.replaceWith(made.children[index].cloneNode(true));
    });
  }

  #facts(task, awaited, waiters, ended) {
    const now = this.model.now();
    const list = make("dl");
    const add = (term, ...values) => list.append(make("dt", "", term), make("dd", "", ...values));
    // Where it waits, and why it is cancelled, have parts of their own.
    const status = ended ? outcome(task, now) : task.status === "queued" ? doing(task, now) : task.status;
    const since = task.status === "cancelling" ? ` ${duration(now - task.cancel_requested)}` : "";
    list.append(make("dt", "", "Status"), make("dd", `s-${TONES[task.status]}`, status + since));
    if (task.node) add("Node", make("span", "mono", nodeName(task.node)), this.model.isSilent(task) ? " · silent" : "");
    if (task.priority !== "NORMAL") add("Priority", task.priority);
    add("Created", `${wall(task.created, this.model)}, ${duration(now - task.created)} ago`);
    if (ended) add("Ended", `${wall(task.ended, this.model)}, after ${fine(task.ended - task.created)}`);
    if (task.progress) add("Progress", ...this.#progress(task.progress, now));
    if (task.attempt) add("Attempt", String(task.attempt));
    if (awaited) add("Waits for", this.#other(awaited));
    if (waiters.length) add("Awaited by", ...waiters.map((each) => this.#other(each)));
    if (task.trace_id) add("Trace", ...this.#trace(task));
    return list;
  }

  #progress({ done, total, fraction, message, seconds_left: left, at }, now) {
    const bar = make("progress");
    bar.max = 1;
    if (fraction !== null && fraction !== undefined) bar.value = fraction;
    const says = total ? `${number(done)} of ${number(total)} (${percent(fraction)})` : number(done);
    const eta = left === null || left === undefined ? "" : `, about ${duration(Math.max(0, left - (now - at)))} left`;
    return [bar, make("div", "", says + eta), message ? make("div", "mute", message) : ""];
  }

  #trace(task) {
    const parts = [make("span", "mono", `${task.trace_id.slice(0, 4)}…${task.trace_id.slice(-4)}`), " "];
    if (/^https?:/.test(this.details.trace_url ?? "")) {
      const link = make("a", "", "open");
      Object.assign(link, { href: this.details.trace_url, target: "_blank", rel: "noopener noreferrer" });
      parts.push(link, " ");
    }
    return [...parts, button("copy", ({ currentTarget }) => copy(task.trace_id, currentTarget), "small")];
  }

  /** A task on the other end of an await: a managed one can be opened, a plain one says what it runs and where it waits. */
  #other(other) {
    if (other.id) return make("div", "", this.#link(other));
    const place = other.where ? ` · at ${short(other.where)} in ${other.where.function}` : "";
    const row = make("div", "", make("bdi", "", other.name), " ", make("small", "mute", make("bdi", "", `${other.function}${place}`)));
    row.title = clean(other.where && line(other.where));
    return row;
  }

  #link({ id, name, task_id: taskId }) {
    const link = button(name, () => this.onShow({ id: id ?? taskId, name }), "link");
    link.title = clean(taskId);
    return link;
  }

  #frames(task, frames) {
    if (!frames.length && !task.where) return null;
    const all = frames.length ? frames : [task.where];
    const first = all.find((frame) => frame.own !== false);
    const rows = all.map((frame) => {
      const row = make("div", frame.own === false ? "mute" : "", make(frame === first ? "b" : "span", "", short(frame)), ` in ${frame.function}`);
      row.title = clean(`${frame.file}:${frame.line}`);
      return row;
    });
    const parts = [make("h3", "", "Waiting at"), make("div", "frames mono", ...rows)];
    if (task.where) {
      const place = `${task.where.file}:${task.where.line}`;
      const more = button("Tasks at this line", () => this.onList(new URLSearchParams({ where: place }), `waiting at ${short(task.where)}`), "small");
      more.append(make("kbd", "", "w"));
      parts.push(more);
    }
    return parts;
  }

  #chain(chain) {
    const steps = chain.map((step, index) => {
      const since = index ? `+${fine(step.at - chain[index - 1].at)}` : wall(step.at, this.model, { hour: "2-digit", minute: "2-digit", second: "2-digit", fractionalSecondDigits: 3 });
      if (step.step === "cause") {
        const says = capital(causeOf({ ...step, asked_by: step.name }));
        // A request that has cancelled its own group is named there.
        const isNamed = step.kind === "explicit" || (chain[1].step === "group" && chain[1].name.startsWith(step.name));
        const facts = [since, isNamed ? "" : step.name, step.message].filter(Boolean).join(" · ");
        return make("li", "", says, " ", make("small", "", facts));
      }
      if (step.step === "group") return make("li", "", `Group ${clean(step.name)} `, make("small", "", since));
      const end = step.ended === null || step.ended === undefined ? "not finished" : `ended ${fine(step.ended - step.at)} later`;
      return make("li", "", "This task ", make("small", "", `${since} · ${end}`));
    });
    return [make("h3", "", "Why it is cancelled"), make("ol", "chain", ...steps)];
  }

  #siblings({ live, ended, rows, ended_rows: endedRows }, task) {
    const total = ended.completed + ended.failed + ended.cancelled;
    const kinds = ["completed", "failed", "cancelled"].filter((kind) => ended[kind]).map((kind) => `${ended[kind]} ${GLYPHS[kind]}`);
    const says = `${number(live)} live, ${number(total)} ended${kinds.length ? ` (${kinds.join(", ")})` : ""}`;
    const items = [...rows, ...endedRows].map((each) =>
      make("li", "", make("span", `glyph s-${TONES[each.status]}`, GLYPHS[each.status]), this.#link(each)));
    const time = button("Timeline", () => this.onTimeline({ group_id: task.group_id }, task.group_id), "small");
    return [make("h3", "", "Siblings"), make("div", "", says), make("ul", "siblings", ...items), time];
  }

  #metadata(metadata) {
    const entries = Object.entries(metadata).flatMap(([key, value]) => [make("dt", "", key), make("dd", "", value)]);
    return [make("h3", "", "Metadata"), make("dl", "", ...entries)];
  }
}
