/** The dialog that cancels one task. Its target is the id it was opened with, whatever the list shows meanwhile. */

import { $, clean, counted, make, put } from "./text.js";
import { get } from "./feed.js";

const SAYS = {
  cancelled: "The task was cancelled and has ended.",
  requested: "The cancellation is requested. The task still runs: it cleans up, or ignores the request.",
  ended: (task) => `The task had already ended${task?.status ? `: ${task.status}` : ""}. Nothing was cancelled.`,
};

export class CancelDialog {
  constructor({ onDone }) {
    this.onDone = onDone;
    this.dialog = $("cancel");
    [this.list, this.answer, this.go] = ["dl", ".answer", "[value=go]"].map((selector) => this.dialog.querySelector(selector));
    this.reason = this.dialog.querySelector("input");
    this.dialog.querySelector("form").addEventListener("submit", (event) => {
      if (event.submitter?.value === "keep") return;
      event.preventDefault();
      if (!this.go.disabled) this.#send();
    });
  }

  /** Opens for a task; `fresh()` is false while the page shows old data. */
  async open(id, name, fresh) {
    this.id = id;
    this.fresh = fresh;
    put($("cancel-title"), `Cancel ${clean(name)}?`);
    this.list.replaceChildren();
    put(this.answer, "");
    this.reason.value = "";
    this.go.disabled = true;
    this.dialog.showModal();
    try {
      const details = await get(`v1/tasks/${encodeURIComponent(id)}`);
      if (this.id === id) this.#describe(details);
    } catch (error) {
      if (this.id === id) put(this.answer, error.status === 404 ? SAYS.ended() : error.message);
    }
  }

  #describe({ task, path, children, can, state }) {
    this.id = task.id ?? this.id; // a link may have named the task by its path
    const facts = [["Name", task.name], ["Id", task.task_id], ["Group", path.slice(0, -1).join(" / ")]];
    facts.push(["Also ends", children ? `${counted(children, "task")} in groups that it has opened` : "no other task"]);
    this.list.replaceChildren(...facts.flatMap(([term, value]) => [make("dt", "", term), make("dd", "", value)]));
    if (state === "ended") put(this.answer, SAYS.ended(task));
    else if (!can.includes("cancel")) put(this.answer, "You may not cancel this task here.");
    else {
      this.go.disabled = false;
      this.reason.focus();
    }
  }

  async #send() {
    if (!this.fresh()) return put(this.answer, "The page has lost its server: the task may have changed. Nothing was sent.");
    this.go.disabled = true;
    put(this.answer, "…");
    const reason = this.reason.value.trim();
    try {
      const done = await get(`v1/tasks/${encodeURIComponent(this.id)}/cancel`, {
        method: "POST",
        headers: { "Content-Type": "application/json" },
        body: JSON.stringify(reason ? { reason } : {}),
      });
      const says = SAYS[done.result];
      put(this.answer, typeof says === "function" ? says(done.task) : says);
    } catch (error) {
      put(this.answer, error.status === 404 ? SAYS.ended() : error.status ? error.message : "The server does not answer; it is unknown whether the request arrived.");
    }
    this.onDone(this.id);
  }
}
