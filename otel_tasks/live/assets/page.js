/** The page: what it shows, from which data, and what each key does. */

import { CancelDialog } from "./cancel.js";
import { Feed, get } from "./feed.js";
import { Model } from "./model.js";
import { Panel } from "./panel.js";
import { Backlog } from "./pause.js";
import { List } from "./rows.js";
import { Summary } from "./summary.js";
import { Timeline } from "./timeline.js";
import { $, button, clean, counted, duration, line, make, mark, nodeName, number, put, short } from "./text.js";

const MAX_OPEN = 20; // expanded rows whose tasks the feed sends
const MORE = [200, 400, 1000];
const POLL = 2; // seconds between two questions for a list
const SORTS = ["status", "age", "name", "count"];

const model = new Model();
const url = new URLSearchParams(location.search);
const view = {
  name: ["oldest", "timeline", "ended"].includes(url.get("view")) ? url.get("view") : "tree",
  q: url.get("q") ?? "",
  list: null, // { query, label }: the tasks behind a warning or at a line
  node: url.get("node") ?? "", // of a fleet; "" shows all
  scope: null, // { query, label }: whose timeline
  sort: "status",
  finished: false,
};
const expanded = new Map(); // key of an opened class -> number of tasks
const found = { key: "", live: [], ended: [], total: 0 }; // the answer to a query
let connection = { state: "connecting", seconds: 0 };
let held = null; // while paused
let ready = false;

const say = (text) => $("say").replaceChildren(make("p", "", text));
const isFresh = () => connection.state === "live";

// --- what is shown -------------------------------------------------------------------------------

const list = new List({ onOpen: openTask, onToggle: toggle, onMore: showMore });
const summary = new Summary({ onList: showList, onChange: render });
const timeline = new Timeline({ model, onOpen: (task) => openTask({ data: task }) });
const panel = new Panel({
  model,
  onShow: (task) => openTask({ data: task }),
  onList: showList,
  onTimeline: showTimeline,
  onCancel: (task) => askCancel(task),
  onClose: closePanel,
  onLoad: want,
  mayCancel: isFresh,
});
const dialog = new CancelDialog({ onDone: () => panel.refresh() });

function entries() {
  const hold = list.watched;
  const { sort, finished } = view;
  if (question()) return model.list(found.key, [...found.live, ...found.ended], { sort, hold });
  const here = (task) => !view.node || task.node === view.node;
  if (view.name === "oldest") return model.list("oldest", [...(model.members.get("oldest")?.tasks.values() ?? [])].filter(here), { sort: "age", hold });
  if (view.name === "ended") return model.list("ended", model.ended.filter(here), { sort, hold });
  return model.tree({ sort, hold, finished, node: view.node });
}

/** Renders before the next frame, once, whatever has changed until then. */
function render() {
  if (!ready || rendering) return;
  rendering = true;
  requestAnimationFrame(() => {
    rendering = false;
    rendered = performance.now();
    renderNow();
  });
}

let rendering = false;
let rendered = 0;

function renderNow() {
  const timed = view.name === "timeline";
  $("list").hidden = timed;
  if (timed) timeline.show([...found.live, ...found.ended], scope().label, found);
  else {
    timeline.hide();
    const rows = entries();
    const flat = Boolean(rows[0]?.flat);
    $("list").classList.toggle("flat", flat);
    put($("ages"), view.name === "ended" ? "TOOK" : flat ? "AGE" : "AGE p50 · p90 · oldest");
    list.show(rows, model);
    showEmpty(rows.length === 0 || (!question() && view.name === "tree" && model.stats.live === 0));
  }
  if (!held) summary.show(model);
  put($("note"), note());
  for (const each of document.querySelectorAll(".sorts")) each.hidden = !isOrdered();
  offerNodes();
  for (const each of $("views").children) mark(each, "aria-pressed", each.value === view.name && !view.list);
  $("scope").hidden = !(timed || view.list);
  put($("scope").firstChild, clean(timed ? scope().label : (view.list?.label ?? "")));
  panel.update();
}

function note() {
  if (view.name === "timeline") return `${number(found.live.length)} live, ${number(found.ended.length)} ended`;
  if (question()) return `${number(found.total)} of ${number(model.stats.live)} live${found.partial ? ", not all were searched" : ""}${found.ended.length ? ` · ${number(found.ended.length)} ended` : ""}`;
  if (view.name === "ended") return `the last ${number(model.ended.length)} that ended`;
  const left = (model.more.groups ?? 0) + (model.more.classes ?? 0);
  return `${number(model.stats.live)} live · ${counted(model.stats.groups, "group")} open${left ? ` · ${counted(left, "smaller row")} not shown: filter to see them` : ""}`;
}

/** The choice of nodes, with a fleet. It changes only if the nodes do: an open list keeps its place. */
function offerNodes() {
  const choice = $("nodes").lastElementChild;
  const names = [...model.nodes.keys()];
  if (view.node && !names.includes(view.node)) names.push(view.node);
  $("nodes").hidden = model.nodes.size === 0;
  const state = JSON.stringify([names, names.map((node) => model.isSilent({ node }))]);
  if (choice.dataset.state !== state) {
    choice.dataset.state = state;
    const option = (value, text) => Object.assign(make("option", "", text), { value });
    choice.replaceChildren(option("", `all ${number(names.length)}`), ...names.map((node) => option(node, `${nodeName(node)}${model.isSilent({ node }) ? " · silent" : ""}`)));
  }
  if (choice.value !== view.node) choice.value = view.node;
}

function chooseNode(node) {
  view.node = node;
  say(node ? `node ${nodeName(node)}` : "all nodes");
  refreshView();
}

function nextNode() {
  if (!model.nodes.size) return say("This view shows one process.");
  const names = ["", ...model.nodes.keys()];
  chooseNode(names[(names.indexOf(view.node) + 1) % names.length]);
}

function showEmpty(empty) {
  $("empty").hidden = !empty;
  if (!empty) return;
  const [text, act] = $("empty").children;
  const done = model.stats.completed + model.stats.failed + model.stats.cancelled;
  let says = "No task is live.";
  let does = null;
  if (question() && found.asking) says = "Searching…";
  else if (question()) {
    says = `No task matches ${clean(view.list?.label ?? `“${view.q}”`)}. ${number(model.stats.live)} are live.`;
    does = ["Clear the filter", clearFilter];
  } else if (view.name === "ended") says = `No task has ended since this page's server began to look; ${number(done)} have before.`;
  else if (view.name === "oldest" && model.stats.live) says = "Loading…";
  else if (model.ended.length) {
    says = `No task is live. ${number(done)} have ended, the last one ${duration(model.now() - model.ended[0].ended)} ago.`;
    does = ["Show the last ones", () => choose("ended")];
  } else if (done) says = `No task is live. ${number(done)} have ended.`;
  put(text, says);
  act.hidden = !does;
  if (does) put(act, does[0]);
  act.onclick = does?.[1] ?? null;
}

function remember() {
  const query = new URLSearchParams();
  if (view.q) query.set("q", view.q);
  if (view.name !== "tree") query.set("view", view.name);
  if (view.node) query.set("node", view.node);
  if (panel.id) query.set("task", panel.id);
  history.replaceState(null, "", query.size ? `?${query}` : location.pathname);
}

// --- lists that the server makes -----------------------------------------------------------------

/** False for the views that have an order of their own. */
const isOrdered = () => view.name === "tree" || (view.name === "oldest" && Boolean(question()));

/** The query of the list that is shown, or null for the views that the stream feeds. */
function question() {
  const query = view.name === "timeline" ? scope().query : view.list ? view.list.query : view.q && new URLSearchParams({ q: view.q });
  if (!query || !view.node || query.has("node")) return query;
  const chosen = new URLSearchParams(query);
  chosen.set("node", view.node);
  return chosen;
}

/** Whose timeline: as chosen, or of the selected row, or of everything. */
function scope() {
  if (view.scope) return view.scope;
  const root = [...model.groups.values()].find((group) => group.parent === null);
  if (model.nodes.size) return { query: new URLSearchParams(), label: view.node ? nodeName(view.node) : "all nodes" };
  return { query: new URLSearchParams({ key: root?.key ?? "" }), label: root?.name ?? "" };
}

let asked = 0;
let round = 0;
let waiting = ""; // the question that has no answer yet: a silent node takes longer than a poll

async function ask(force = false) {
  const query = question();
  if (!query || (held && !force) || (!force && performance.now() - asked < POLL * 1000)) return;
  const key = `${view.name} ${query}`;
  if (waiting === key && !force) return;
  waiting = key;
  asked = performance.now();
  const mine = ++round;
  if (found.key !== key) Object.assign(found, { key, live: [], ended: [], total: 0, asking: true });
  const timed = view.name === "timeline";
  const live = new URLSearchParams(query);
  live.set("sort", view.sort === "count" ? "age" : view.sort);
  if (timed) live.set("limit", "100");
  const ended = new URLSearchParams(query);
  ended.set("state", "ended");
  ended.set("limit", "100");
  try {
    const onlyEnded = view.name === "ended";
    const first = onlyEnded ? null : await get(`v1/tasks?${live}`);
    const also = timed || onlyEnded || (view.q && (view.finished || first.total === 0));
    const second = also ? await get(`v1/tasks?${ended}`) : null;
    if (mine !== round) return;
    const silent = [first, second].some((answer) => answer?.silent?.length);
    Object.assign(found, { live: first?.rows ?? [], ended: second?.rows ?? [], total: first?.total ?? 0, partial: first?.partial, silent, asking: false });
  } catch (error) {
    if (mine !== round) return;
    found.asking = false;
    if (error.status === 400) say(error.message);
  }
  waiting = "";
  render();
}

function showList(query, label) {
  Object.assign(view, { name: "tree", list: { query: new URLSearchParams(query), label } });
  refreshView();
}

function showTimeline(query, label) {
  Object.assign(view, { name: "timeline", list: null, scope: { query: new URLSearchParams(query), label } });
  refreshView();
}

function choose(name) {
  const entry = list.current;
  if (name === "timeline" && entry) {
    // A node by its name: the key of its root is not known before it has answered.
    if (entry.data.parent === null && entry.data.node) view.scope = { query: new URLSearchParams({ node: entry.data.node }), label: nodeName(entry.data.node) };
    else if (entry.kind === "group" || entry.kind === "class") view.scope = { query: new URLSearchParams({ key: entry.key }), label: entry.data.name };
    else if (entry.data.group_id) view.scope = { query: new URLSearchParams({ group_id: entry.data.group_id }), label: entry.data.group_id };
  }
  Object.assign(view, { name, list: null });
  refreshView();
}

function clearFilter() {
  Object.assign(view, { q: "", list: null });
  $("search").value = "";
  refreshView();
}

function refreshView() {
  list.reset();
  want();
  remember();
  render();
  ask(true);
}

// --- rows that are opened ------------------------------------------------------------------------

/** Tells the feed what is shown. */
function want() {
  const keys = [...expanded].map(([key, limit]) => (limit > MORE[0] ? `${key}:${limit}` : key));
  if (view.name === "oldest") keys.unshift("oldest:50");
  feed.want(keys, panel.watched);
}

async function toggle({ kind, key, open, data }, to = !open) {
  if (to === Boolean(open)) return;
  model.opened.set(key, to);
  if (kind === "class") {
    if (to) await expand(key, MORE[0], data.name);
    else {
      expanded.delete(key);
      model.members.delete(key);
      want();
    }
  }
  render();
}

async function expand(key, limit) {
  expanded.delete(key);
  expanded.set(key, limit);
  if (expanded.size > MAX_OPEN) {
    const [oldest] = expanded.keys();
    expanded.delete(oldest);
    model.members.delete(oldest);
    model.opened.set(oldest, false);
    say(`${MAX_OPEN} rows can be open at a time: the one that was opened first is closed`);
  }
  render();
  try {
    const { rows, total } = await get(`v1/tasks?${new URLSearchParams({ key, limit })}`);
    if (expanded.has(key)) model.take({ key, full: true, total, set: rows });
  } catch (error) {
    say(error.message);
  }
  want();
  render();
}

function showMore({ data }) {
  const limit = MORE.find((each) => each > data.shown);
  if (limit) expand(data.key, limit);
}

// --- panel and dialog ----------------------------------------------------------------------------

function openTask({ data, kind }) {
  if (kind === "more" || data === undefined) return;
  panel.show({ ...data, id: data.id ?? data.task_id });
  $("panel").parentNode.classList.add("with-panel");
  remember();
}

function closePanel() {
  panel.hide();
  $("panel").parentNode.classList.remove("with-panel");
  list.select(list.selected);
  remember();
}

function askCancel(task) {
  if (!model.about.actions.includes("cancel")) return say("This view is read-only.");
  if (!isFresh()) return say("The data is stale: nothing can be cancelled.");
  if (task && model.isSilent(task)) return say("The task's node does not answer: nothing can be cancelled there.");
  if (!task?.id || task.ended !== undefined) return say("Select a live task first.");
  dialog.open(task.id, task.name, isFresh);
}

// --- pause ---------------------------------------------------------------------------------------

function pause(on = !held) {
  const { events = [], lost = false } = held ?? {};
  held = on ? (held ?? new Backlog()) : null;
  model.frozen = on ? model.now() : undefined;
  mark($("pause"), "aria-pressed", on);
  put($("pause").firstChild, on ? "Resume" : "Pause");
  if (!on) {
    for (const [type, data] of events) model.apply(type, data);
    if (lost) feed.restart();
    panel.refresh();
    ask(true);
  }
  showState();
  render();
}

// --- events --------------------------------------------------------------------------------------

function onEvent(type, data) {
  if (type === "task") return held || panel.take(data);
  // The tasks of a row that is opened during a pause are no change.
  if (held && ready && !(type === "rows" && data.full && !model.members.has(data.key))) {
    held.add(type, data);
    return showState();
  }
  model.apply(type, data);
  ready = true;
  render();
  ask();
}

function onState(state) {
  const turned = state.state !== connection.state;
  connection = state;
  document.body.classList.toggle("stale", state.state === "stale");
  showState();
  if (turned && state.state === "stale") say("Connection lost: what is shown is old.");
  if (turned && state.state === "live" && ready) {
    say("Connected.");
    panel.refresh();
  }
  if (ready) panel.update(isFresh());
  if (!ready && state.message) put($("note"), state.message);
}

function showState() {
  const { state, seconds, message } = connection;
  let says = { live: `● live, ${model.about?.interval ?? 1} s`, connecting: "… connecting" }[state];
  if (state === "stale") says = ready ? `! stale for ${duration(seconds)}, reconnecting${message ? ` · ${message}` : ""}` : `! no connection · ${message}`;
  else if (held) says = `❚❚ paused · ${counted(held.changes, "change")} waiting`;
  put($("state"), clean(says));
  mark($("state"), "class", state === "stale" ? "stale" : held ? "paused" : state);
}

// --- keys ----------------------------------------------------------------------------------------

const KEYS = {
  j: ["next row", () => list.move(1)],
  k: ["previous row", () => list.move(-1)],
  l: ["open the row, or the task's panel", openCurrent],
  h: ["close the row, or go to the row above", closeCurrent],
  Enter: ["open the task's panel, or turn the row", () => (list.current?.open === undefined ? openCurrent() : toggle(list.current))],
  "/": ["filter", () => $("search").select()],
  n: ["next task that is being cancelled", () => list.find(isCancelling) || say("No task is being cancelled.")],
  s: ["sort by status, age, name, count", () => isOrdered() && sortBy(SORTS[(SORTS.indexOf(view.sort) + 1) % SORTS.length])],
  " ": ["pause, resume", () => pause()],
  w: ["all tasks that wait at the selected one's line", sameLine],
  t: ["tree or flat list of the oldest", () => choose(view.name === "tree" && !view.list ? "oldest" : "tree")],
  g: ["timeline of the selected row", () => choose(view.name === "timeline" ? "tree" : "timeline")],
  m: ["with a fleet: all nodes, or the next one", nextNode],
  x: ["cancel the selected task", () => askCancel(panel.id ? panel.task : taskOf(list.current))],
  Escape: ["close the panel, the filter, the view", leave],
  "?": ["these keys", () => $("help").showModal()],
};
const ALIASES = { ArrowDown: "j", ArrowUp: "k", ArrowRight: "l", ArrowLeft: "h" };
const MOVES = { Home: () => list.jump(0), End: () => list.jump(-1), PageDown: () => list.move(20), PageUp: () => list.move(-20) };

const taskOf = (entry) => (entry?.kind === "task" ? entry.data : null);
const isCancelling = (entry) => taskOf(entry)?.status === "cancelling";

function openCurrent() {
  const entry = list.current;
  if (!entry) return list.jump(0);
  if (entry.kind === "more") return showMore(entry);
  if (entry.open === undefined) return openTask(entry);
  if (entry.open) return list.move(1);
  return toggle(entry, true);
}

function closeCurrent() {
  const entry = list.current;
  if (entry?.open) return toggle(entry, false);
  const at = list.entries.indexOf(entry);
  for (let above = at - 1; above >= 0; above--) {
    if (list.entries[above].level < entry.level) return list.jump(above);
  }
}

function sortBy(sort) {
  view.sort = sort;
  $("sort").value = sort;
  model.order.clear();
  say(`sorted by ${sort}`);
  render();
  ask(true);
}

function sameLine() {
  const task = panel.details?.task ?? taskOf(list.current);
  if (task?.where) showList({ where: line(task.where) }, `waiting at ${short(task.where)}`);
  else say("It is not known where this task waits: open it first.");
}

function leave() {
  if (panel.id) closePanel();
  else if (view.list || view.q) clearFilter();
  else if (view.name !== "tree") choose("tree");
}

function onKey(event) {
  const { target, key } = event;
  if (event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]")) return;
  if (target.matches("input:not([type=checkbox]), textarea, select")) return;
  const isButton = target.closest("button, a, input, label");
  if (isButton && (key === " " || key === "Enter")) return;
  const act = KEYS[ALIASES[key] ?? key]?.[1] ?? MOVES[key];
  if (!act || !ready) return;
  event.preventDefault();
  act();
}

// --- wiring --------------------------------------------------------------------------------------

document.addEventListener("keydown", onKey);
$("pause").addEventListener("click", () => ready && pause());
$("keys").addEventListener("click", () => $("help").showModal());
$("sort").addEventListener("change", ({ target }) => sortBy(target.value));
$("nodes").lastElementChild.addEventListener("change", ({ target }) => chooseNode(target.value));
$("finished").addEventListener("change", ({ target }) => {
  view.finished = target.checked;
  refreshView();
});
$("views").addEventListener("click", ({ target }) => target.value && choose(target.value));
$("scope").lastElementChild.addEventListener("click", () => (view.list ? clearFilter() : choose("tree")));
$("search").value = view.q;
$("search").addEventListener("input", ({ target }) => {
  clearTimeout(found.timer);
  found.timer = setTimeout(() => {
    view.q = target.value.trim();
    view.list = null;
    if (view.name === "timeline" && view.q) view.name = "tree";
    refreshView();
  }, 150);
});
$("search").addEventListener("keydown", (event) => {
  if (event.key === "Escape") clearFilter();
  if (event.key !== "Escape" && event.key !== "Enter" && event.key !== "ArrowDown") return;
  event.preventDefault();
  if (list.entries.length) list.select(list.current?.key ?? list.entries[0].key);
  else event.target.blur();
});
for (const [key, [does]] of Object.entries(KEYS)) {
  const name = { " ": "space", Escape: "Esc" }[key] ?? key;
  $("help").querySelector("dl").append(make("dt", "", make("kbd", "", name)), make("dd", "", does));
}

const feed = new Feed(onEvent, onState);
if (view.name === "oldest") want();
if (url.get("task")) openTask({ data: { id: url.get("task"), name: "…" } });
// Ages grow between updates, too.
setInterval(() => !held && isFresh() && performance.now() - rendered > 900 && render(), 500);
