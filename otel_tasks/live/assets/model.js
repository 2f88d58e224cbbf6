/** What the feed has sent, and the list of rows that it makes: groups, classes below them, tasks below those. */

const RANK = { cancelling: 0, queued: 1 };
const FEW_ROWS = 40; // so many groups and classes are shown opened
const ENDED = 256;

const rankOf = (row) => (row.cancelling ? 0 : row.queued ? 1 : 2);
const byText = (a, b) => (a < b ? -1 : a > b ? 1 : 0);
const byAge = (a, b) => (a.created ?? a.oldest ?? Infinity) - (b.created ?? b.oldest ?? Infinity);
const byId = (a, b) => byText(a.id ?? a.key, b.id ?? b.key);
const byName = new Intl.Collator("en", { numeric: true }).compare; // load-9 before load-10
const named = (a, b) => (a.name === b.name ? 0 : byName(a.name, b.name));

/** Ties are broken by id, so that equal rows never change places. */
const ROW_ORDER = {
  status: (a, b) => rankOf(a) - rankOf(b) || named(a, b) || byId(a, b),
  age: (a, b) => byAge(a, b) || named(a, b) || byId(a, b),
  name: (a, b) => named(a, b) || byId(a, b),
  count: (a, b) => b.count - a.count || named(a, b) || byId(a, b),
};
export const TASK_ORDER = {
  status: (a, b) => (RANK[a.status] ?? 2) - (RANK[b.status] ?? 2) || ROW_ORDER.age(a, b),
  age: ROW_ORDER.age,
  name: ROW_ORDER.name,
  count: ROW_ORDER.age,
};

/** A live task has an id that no other task ever has; an ended one may have lost it. */
export const keyOf = (task) => (task.ended === undefined ? task.id : `end ${task.task_id} ${task.created}`);

export class Model {
  constructor() {
    this.clear();
    this.opened = new Map(); // key of a group or class -> whether its row is open
    this.order = new Map(); // key of a row -> the keys below it, as shown last
  }

  clear() {
    this.about = null;
    this.groups = new Map();
    this.classes = new Map();
    this.cancelling = new Map();
    this.members = new Map(); // key of an expanded row -> { total, tasks }
    this.warnings = [];
    this.ended = [];
    this.samples = [];
    this.more = {};
    this.nodes = new Map(); // name -> node, with a fleet
  }

  // --- events -----------------------------------------------------------------------------------

  apply(type, data) {
    if (type === "snapshot") this.#load(data);
    else if (type === "delta") this.#change(data);
    else if (type === "rows") this.take(data);
    this.#decide();
  }

  #load(data) {
    const members = this.about?.instance === data.instance ? this.members : new Map();
    this.clear();
    this.members = members;
    this.about = data;
    this.clock(data);
    for (const group of data.groups) this.groups.set(group.key, group);
    for (const each of data.classes) this.classes.set(each.key, each);
    for (const task of data.cancelling) this.cancelling.set(task.id, task);
    ({ stats: this.stats, samples: this.samples, warnings: this.warnings, ended: this.ended, more: this.more } = data);
    this.#meet(data.nodes ?? []);
  }

  #change(data) {
    this.clock(data);
    this.stats = data.stats;
    this.more = data.more;
    this.samples = [...this.samples.slice(-59), data.sample];
    for (const list of ["groups", "classes", "cancelling"]) {
      for (const key of data.gone[list] ?? []) this[list].delete(key);
      for (const entry of data.set[list] ?? []) this[list].set(entry.key ?? entry.id, entry);
    }
    if (data.warnings) this.warnings = data.warnings;
    if (data.nodes) this.#meet(data.nodes);
    if (data.ended?.length) this.ended = [...data.ended, ...this.ended].slice(0, ENDED);
  }

  #meet(nodes) {
    this.nodes = new Map(nodes.map((node) => [node.node, node]));
  }

  /** True for a row of a node that does not answer. */
  isSilent({ node }) {
    return (this.nodes.get(node)?.silent_since ?? null) !== null;
  }

  /** The rows of the chosen node, or all. A node without rows has one that says so. */
  #roots(only) {
    const roots = [...this.groups.values()].filter((group) => group.parent === null);
    const known = new Set(roots.map((root) => root.node));
    for (const { node } of this.nodes.values()) {
      if (!known.has(node)) roots.push({ key: `node ${node}`, parent: null, name: "", node, kind: "root", instances: 1, count: 0, queued: 0, cancelling: 0, p50: null, p90: null, oldest: null, limit: null, progress: null });
    }
    return only ? roots.filter((root) => root.node === only) : roots;
  }

  /** Takes the tasks of an expanded row: all of them, or those that changed. */
  take({ key, full, total, set, gone = [] }) {
    const known = this.members.get(key);
    const tasks = full || !known ? new Map() : known.tasks;
    for (const id of gone) tasks.delete(id);
    for (const task of set) tasks.set(task.id, task);
    this.members.set(key, { total, tasks });
  }

  /** The server's clock: `now()` continues it until the next update. */
  clock({ now, epoch }) {
    this.epoch = epoch;
    this.skew = now - performance.now() / 1000;
  }

  now() {
    return this.frozen ?? performance.now() / 1000 + (this.skew ?? 0);
  }

  // --- what is open -----------------------------------------------------------------------------

  isOpen(key) {
    return this.opened.get(key) ?? false;
  }

  /** Decides once per group whether its row starts open: all of few groups, otherwise those with trouble. */
  #decide() {
    const few = this.groups.size + this.classes.size <= FEW_ROWS;
    for (const { key, parent, cancelling } of this.groups.values()) {
      if (!this.opened.has(key)) this.opened.set(key, parent === null || few || cancelling > 0);
    }
  }

  // --- rows -------------------------------------------------------------------------------------

  /** The order of the rows below `parent`. While somebody looks (`hold`), known rows stay where they are. */
  arrange(parent, rows, compare, hold) {
    const sorted = rows.sort(compare);
    const before = hold && this.order.get(parent);
    if (before) {
      const place = new Map(before.map((key, index) => [key, index]));
      const at = (row) => place.get(row.key ?? row.id) ?? Infinity;
      sorted.sort((a, b) => (at(a) === at(b) ? 0 : at(a) - at(b)));
    }
    this.order.set(parent, sorted.map((row) => row.key ?? row.id));
    return sorted;
  }

  /** Which of the groups that share a row a task belongs to: "#4711". */
  instanceOf(task) {
    if (!(this.groups.get(task.group)?.instances > 1)) return "";
    return task.group_id.slice(task.group_id.lastIndexOf("#"));
  }

  tree({ sort, hold, finished, node = "" }) {
    const children = new Map();
    for (const group of this.groups.values()) listed(children, group.parent).push(group);
    const inside = new Map();
    for (const each of this.classes.values()) listed(inside, each.group).push(each);
    const cancelling = new Map();
    for (const task of this.cancelling.values()) listed(cancelling, task.class).push(task);
    const rows = [];
    const addTask = (task, level, kind = "task") => rows.push({ key: keyOf(task), kind, level, data: task, of: this.instanceOf(task) });
    const addClass = (each, level) => {
      // A class of one task is shown as that task.
      if (each.task && !finished) return addTask(this.cancelling.get(each.task.id) ?? each.task, level);
      const open = this.isOpen(each.key);
      rows.push({ key: each.key, kind: "class", level, data: each, open });
      const known = open && this.members.get(each.key);
      // Tasks that are being cancelled are there even if the class is closed.
      const tasks = known ? [...known.tasks.values()] : (cancelling.get(each.key) ?? []);
      for (const task of this.arrange(each.key, tasks, TASK_ORDER[sort], hold)) addTask(task, level + 1);
      if (known && known.total > known.tasks.size) {
        rows.push({ key: `more ${each.key}`, kind: "more", level: level + 1, data: { key: each.key, shown: known.tasks.size, total: known.total } });
      }
      if (!open || !finished) return;
      for (const task of this.ended) if (task.class === each.key) addTask(task, level + 1, "ended");
    };
    const addGroup = (group, level) => {
      const open = this.isOpen(group.key);
      rows.push({ key: group.key, kind: "group", level, data: group, open });
      if (!open) return;
      const order = ROW_ORDER[sort];
      for (const each of this.arrange(`in ${group.key}`, inside.get(group.key) ?? [], order, hold)) addClass(each, level + 1);
      for (const each of this.arrange(group.key, children.get(group.key) ?? [], order, hold)) addGroup(each, level + 1);
    };
    for (const root of this.arrange(null, this.#roots(node), ROW_ORDER[sort], hold)) addGroup(root, 1);
    return rows;
  }

  /** A flat list of live or ended tasks. */
  list(name, tasks, { sort, hold }) {
    const live = this.arrange(name, tasks.filter((task) => task.ended === undefined), TASK_ORDER[sort], hold);
    const ended = tasks.filter((task) => task.ended !== undefined);
    return [
      ...live.map((task) => ({ key: keyOf(task), kind: "task", level: 1, data: task, flat: true })),
      ...ended.map((task) => ({ key: keyOf(task), kind: "ended", level: 1, data: task, flat: true })),
    ];
  }
}

function listed(map, key) {
  let list = map.get(key);
  if (!list) map.set(key, (list = []));
  return list;
}
