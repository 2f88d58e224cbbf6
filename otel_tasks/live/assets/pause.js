/** The events that arrive while the page is paused, and the number of changes in them. */

const MOST = 600; // events: ten minutes

const sizeOf = (lists) => Object.values(lists ?? {}).flat().length;

export class Backlog {
  constructor() {
    this.events = [];
    this.changes = 0;
    this.lost = false;
  }

  add(type, data) {
    this.changes += type === "snapshot" ? 1 : changesIn(type, data);
    if (type === "snapshot") this.events = [];
    if (this.events.length < MOST) this.events.push([type, data]);
    else this.lost = true;
  }
}

/** Each new stream sends all tasks of a row again: they are no change. */
function changesIn(type, { full, set, gone, ended, ended_more: more }) {
  if (type === "rows") return full ? 0 : set.length + gone.length;
  return sizeOf(set) + sizeOf(gone) + (ended?.length ?? 0) + (more ?? 0);
}
