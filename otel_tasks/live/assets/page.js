// Shows how many tasks run, as the events of the feed say.
const live = document.getElementById("live");
const events = new EventSource("v1/events");
for (const kind of ["snapshot", "delta"]) {
  events.addEventListener(kind, (event) => {
    const { stats } = JSON.parse(event.data);
    live.textContent = `${stats.running} running, ${stats.queued} waiting, ${stats.cancelling} cancelling`;
  });
}
