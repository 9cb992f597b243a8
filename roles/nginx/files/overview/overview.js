// The overview page: reads Flower and Prometheus every few seconds and shows what the monitoring guide calls the numbers
// that matter. Nothing here is sent anywhere, and every text from outside goes in as text, never as HTML: the arguments
// of a task are whatever somebody called it with.

const REFRESH = 10; // seconds between two readings of a source
const PATIENCE = 8; // seconds until an answer is given up; below REFRESH
const POINTS = 240; // of a line of a plot
const LINES = 8; // of a plot, as many as there are colours
const TASKS = 50;
const OWN = /^hothouse\./; // tasks that deployments send; alerts leave them out as well
const CALM = 300; // seconds: the shortest range that rates in plots are taken over

const settings = { config: null, plots: [] };
const choice = { range: 3600, name: "", state: "", own: false, whole: new Set() };
const $ = (id) => document.getElementById(id);

// ---- Elements ----------------------------------------------------------------------------------------------------

/** An element with attributes, a class and children; a string becomes text. */
function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "onclick") made.addEventListener("click", value);
    else if (value !== undefined && value !== false) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== undefined && child !== null));
  return made;
}

/** A long dotted name that may break after each of its words. */
function breakable(name) {
  const made = document.createDocumentFragment();
  for (const word of name.split(/(?<=[._@-])/)) made.append(word, document.createElement("wbr"));
  return made;
}

/** A sign and a word: level is good, warn, bad, busy or idle. */
const mark = (level, text) => element("span", { class: `mark ${level}` }, text);

/** Only what really is an address of the web becomes a link. Ours keep the name and port that this page was asked by. */
function safeLink(address) {
  try {
    const url = new URL(address, location.href);
    if (!["https:", "http:"].includes(url.protocol)) return null;
    if (url.hostname === settings.config.server_name && url.pathname.endsWith("/runbook.html")) {
      return `runbook.html${url.hash}`;
    }
    return url.href;
  } catch {
    return null;
  }
}

/** Sets text only where it changed: a live region is not read aloud again, a selection stays. */
function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

/**
 * Make the body of a table say `rows`: [{key, cells: [{text, class, make}]}]. `text` is what a cell says and `make`, if
 * there is one, makes it. A row that stays, stays the same element, so that the keyboard's focus in it stays too.
 */
function fillTable(table, rows, nothing) {
  const body = table.tBodies[0];
  const labels = [...table.tHead.rows[0].cells].map((head) => head.firstChild.textContent.trim());
  if (rows.length === 0) rows = [{ key: "", cells: [{ text: nothing, span: labels.length }] }];
  const old = new Map([...body.rows].map((row) => [row.dataset.key, row]));
  const wanted = new Set(rows.map((row) => row.key));
  for (const [key, row] of old) if (!wanted.has(key)) row.remove();
  let place = body.firstElementChild;
  for (const { key, cells } of rows) {
    let row = old.get(key);
    if (!row) {
      row = element("tr", { role: "row", "data-key": key, class: key === "" ? "empty" : undefined });
      row.append(
        ...cells.map(({ span }, column) =>
          column === 0 && !span
            ? element("th", { scope: "row", role: "rowheader" })
            : element("td", { role: "cell", colspan: span, "data-label": span ? undefined : labels[column] }),
        ),
      );
    }
    if (row === place) place = place.nextElementSibling;
    else body.insertBefore(row, place);
    cells.forEach(({ text, class: style = "", make, sign = text }, column) => {
      const cell = row.cells[column];
      if (cell.className !== style) cell.className = style;
      if (cell.dataset.sign === sign) return;
      cell.dataset.sign = sign;
      cell.replaceChildren(make ? make() : text);
    });
  }
  cutTable(table);
}

/**
 * On a narrow screen a table begins with a few rows and a button that shows the others: data-first says how many. A row
 * in which something is wrong is never among the others, but in a table with data-plain.
 */
function cutTable(table) {
  const first = Number(table.dataset.first);
  if (!first) return;
  let beyond = 0;
  [...table.tBodies[0].rows].forEach((row, index) => {
    const wrong = table.dataset.plain === undefined && row.querySelector(".mark.bad, .mark.warn, .over") !== null;
    const cut = index >= first && !wrong;
    row.classList.toggle("beyond", cut);
    beyond += cut;
  });
  const complete = choice.whole.has(table.id);
  table.toggleAttribute("data-whole", complete);
  let button = document.querySelector(`button[aria-controls="${table.id}"]`);
  if (!button) {
    button = element("button", { type: "button", class: "rest", "aria-controls": table.id, onclick: () => {
      if (!choice.whole.delete(table.id)) choice.whole.add(table.id);
      rememberChoices();
      cutTable(table);
    } });
    table.after(button);
  }
  button.hidden = beyond === 0;
  button.setAttribute("aria-expanded", String(complete));
  const text = complete ? "Show fewer" : `Show ${beyond} more`;
  if (button.dataset.sign === text) return;
  button.dataset.sign = text;
  button.replaceChildren(text, element("span", { class: "unseen" }, ` of ${table.caption.textContent}`));
}

// ---- Numbers and times -------------------------------------------------------------------------------------------

const language = "en-GB";
const whole = new Intl.NumberFormat(language, { maximumFractionDigits: 0 });
const clock = new Intl.DateTimeFormat(language, { hour: "2-digit", minute: "2-digit", second: "2-digit" });
const dayAndClock = new Intl.DateTimeFormat(language, {
  day: "numeric", month: "short", hour: "2-digit", minute: "2-digit", second: "2-digit",
});
const minutes = new Intl.DateTimeFormat(language, { hour: "2-digit", minute: "2-digit" });
const days = new Intl.DateTimeFormat(language, { day: "numeric", month: "short" });
const NONE = "–";
const NAMED = 10; // tasks that no release knows: as many are named

const known = (value) => typeof value === "number" && Number.isFinite(value);

/** Three digits that matter, never an exponent. */
function digits(value) {
  if (!known(value)) return NONE;
  const size = Math.abs(value);
  if (size >= 100 || size === 0) return whole.format(value);
  const places = size >= 10 ? 1 : size >= 1 ? 2 : Math.min(3, 2 - Math.floor(Math.log10(size)));
  return new Intl.NumberFormat(language, { maximumFractionDigits: places }).format(value);
}

/** 100 % and 0 % are said only of all and of none. */
function percent(value) {
  if (!known(value)) return NONE;
  if (value > 99.9 && value < 100) return "> 99.9 %";
  if (value > 0 && value < 0.1) return "< 0.1 %";
  return `${new Intl.NumberFormat(language, { maximumFractionDigits: 1 }).format(value)} %`;
}

function seconds(value) {
  if (!known(value)) return NONE;
  const size = Math.abs(value);
  if (size === 0) return "0 s";
  if (size < 1) return `${digits(value * 1000)} ms`;
  if (size < 120) return `${digits(value)} s`;
  if (size < 7200) return `${whole.format(value / 60)} min`;
  return size < 172800 ? `${digits(value / 3600)} h` : `${digits(value / 86400)} d`;
}

const UNITS = {
  "per second": digits,
  seconds,
  messages: digits,
  percent,
};

const plural = (count, word) => `${whole.format(count)} ${word}${count === 1 ? "" : "s"}`;

/** Time of day, with the day if that is another one. */
function moment(unix) {
  const date = new Date(unix * 1000);
  return date.toDateString() === new Date().toDateString() ? clock.format(date) : dayAndClock.format(date);
}

const timeElement = (unix) =>
  element("time", { datetime: new Date(unix * 1000).toISOString() }, moment(unix));

// ---- Sources -----------------------------------------------------------------------------------------------------

/** What a request answered, parsed. Raises an Error whose message says what to tell the reader. */
async function ask(address) {
  let answer;
  try {
    answer = await fetch(address, {
      cache: "no-store", credentials: "same-origin", signal: AbortSignal.timeout(PATIENCE * 1000),
    });
    if (answer.ok) return await answer.json();
  } catch (error) {
    if (error.name === "TimeoutError") throw new Error(`no answer within ${PATIENCE} s`);
    if (error instanceof SyntaxError) throw new Error("an answer that is not JSON");
    throw new Error("no connection");
  }
  if (answer.status === 401) throw new Error("the login was refused; reload this page");
  if (answer.status === 429) throw new Error("too many requests or refused logins from here; wait a minute");
  throw new Error(`HTTP ${answer.status}`);
}

/** Something that is read again and again, one reading at a time, while somebody looks. */
class Source {
  constructor(name, read) {
    this.name = name;
    this.read = read;
    this.lastRead = null; // Date.now() of the last success
    this.error = null; // why the last attempt failed
    this.failedAt = null; // Date.now() of the first failure in a row
    this.running = false;
    this.again = false;
    this.timer = 0;
  }

  /** Read now, or as soon as the reading under way is done. */
  async poke() {
    if (this.running) {
      this.again = true;
      return;
    }
    clearTimeout(this.timer);
    this.running = true;
    do {
      this.again = false;
      try {
        await this.read();
        this.lastRead = Date.now();
        this.error = this.failedAt = null;
      } catch (error) {
        this.error = error.message;
        this.failedAt ??= Date.now();
      }
      showFreshness();
    } while (this.again && !document.hidden);
    this.running = false;
    if (!document.hidden) this.timer = setTimeout(() => this.poke(), REFRESH * 1000);
  }

  get age() {
    return this.lastRead === null ? Infinity : (Date.now() - this.lastRead) / 1000;
  }

  /** "waiting", "fresh", "stale" (read too long ago) or "unreachable". */
  get state() {
    if (this.error) return "unreachable";
    if (this.lastRead === null) return "waiting";
    return this.age > 3 * REFRESH ? "stale" : "fresh";
  }
}

const flower = new Source("Flower", readFlower);
const prometheus = new Source("Prometheus", readPrometheus);

// ---- Flower: workers, recent tasks; queues where there is no Prometheus ---------------------------------------------

let shownTasks = [];
let queueUnknown = false;
const taskNames = new Set();

async function readFlower() {
  const { config } = settings;
  const query = new URLSearchParams({ limit: TASKS, sort_by: "-received" });
  if (choice.state) query.set("state", choice.state);
  // Flower takes three letters at least; what it was not asked is sifted here.
  if (choice.name.length >= 3) query.set("search", `name:"${choice.name.replace(/["\\]/g, "\\$&")}"`);
  const [workers, tasks, queues] = await Promise.all([
    // A Flower that has just begun has not asked the workers for their queues; refresh makes it.
    ask(`${config.flower}workers?json=1${queueUnknown ? "&refresh=1" : ""}`),
    newestTasks(query),
    config.prometheus ? null : ask(`${config.flower}api/queues/length`),
  ]);
  showWorkers(workers.data);
  shownTasks = Object.values(tasks).sort((a, b) => (b.received ?? 0) - (a.received ?? 0));
  showTasks();
  if (queues) {
    const online = new Set(workers.data.filter(({ status }) => status).map(({ hostname }) => hostname));
    const lengths = new Map(queues.active_queues.map(({ name, messages }) => [name, messages]));
    queueUnknown = config.queues.some((queue) => !lengths.has(queue));
    const consumers = new Map(
      config.queues.map((queue) => [
        queue,
        Object.entries(config.workers).filter(([name, from]) => online.has(name) && from.includes(queue)).length,
      ]),
    );
    showQueues({ messages: lengths, oldest: new Map(), consumers });
  }
}

const isShown = (name) => choice.own || !OWN.test(name ?? "");

/** The newest tasks that are shown; Flower cannot leave out some, so more are asked for until there are enough. */
async function newestTasks(query) {
  for (let limit = TASKS; ; limit *= 10) {
    query.set("limit", limit);
    const all = Object.entries(await ask(`${settings.config.flower}api/tasks?${query}`));
    const shown = all.filter(([, { name }]) => isShown(name)).slice(0, TASKS);
    if (shown.length === TASKS || all.length < limit || limit > TASKS) return Object.fromEntries(shown);
  }
}

function showWorkers(found) {
  const { config } = settings;
  const byName = new Map(found.map((worker) => [worker.hostname, worker]));
  // A worker that is not in the inventory counts only while it runs: Flower keeps what was renamed or removed for a while.
  const strangers = found.filter(({ hostname, status }) => status && !(hostname in config.workers));
  const names = [...Object.keys(config.workers).sort(), ...strangers.map(({ hostname }) => hostname).sort()];
  fillTable(
    $("workers-table"),
    names.map((name) => {
      const worker = byName.get(name);
      const stranger = !(name in config.workers);
      const [level, state] = stranger
        ? ["warn", "not expected"]
        : worker?.status ? ["good", "online"] : ["bad", worker ? "offline" : "not seen"];
      const count = (kind) => (worker ? (worker[kind] ?? 0) : undefined);
      const failed = count("task-failed");
      const ended = worker && count("task-succeeded") + failed;
      const queues = stranger ? NONE : config.workers[name].join(", ");
      return {
        key: name,
        cells: [
          {
            text: name,
            make: () => element("a", { href: `${config.flower}worker/${encodeURIComponent(name)}` }, breakable(name)),
          },
          { text: state, make: () => mark(level, state) },
          { text: queues, make: () => breakable(queues) },
          { text: worker?.status ? digits(worker.active ?? 0) : NONE, class: "number" },
          { text: known(ended) ? whole.format(ended) : NONE, class: "number" },
          { text: known(failed) ? whole.format(failed) : NONE, class: "number" },
          { text: worker?.status ? (worker.loadavg?.[0] ?? 0).toFixed(2) : NONE, class: "number" },
        ],
      };
    }),
    "The inventory has no workers",
  );
  const expected = Object.keys(config.workers);
  const online = expected.filter((name) => byName.get(name)?.status).length;
  const active = found.reduce((sum, { status, active }) => sum + (status ? (active ?? 0) : 0), 0);
  const missing = expected.length - online;
  const detail = missing
    ? `${whole.format(missing)} of ${whole.format(expected.length)} missing`
    : strangers.length ? `${whole.format(strangers.length)} not expected` : "all online";
  showTile("workers", {
    name: "Active workers",
    value: `${whole.format(online)} of ${whole.format(expected.length)}`,
    level: missing ? "bad" : strangers.length ? "warn" : "good",
    state: detail,
    detail: `${plural(active, "task")} active`,
    source: "workers",
  });
}

const STATES = { SUCCESS: "good", FAILURE: "bad", RETRY: "warn", REJECTED: "warn", REVOKED: "warn", STARTED: "busy" };

function showTasks() {
  const wanted = choice.name.toLowerCase();
  const tasks = shownTasks.filter(
    // A task of whose beginning Flower heard nothing has no name.
    ({ name, state }) =>
      name && isShown(name) && (!choice.state || state === choice.state) && (!wanted || name.toLowerCase().includes(wanted)),
  );
  const time = (unix) => ({
    text: known(unix) ? moment(unix) : NONE, class: "number", make: () => (known(unix) ? timeElement(unix) : NONE),
  });
  fillTable(
    $("tasks-table"),
    tasks.map((task) => {
      const args = [task.args, task.kwargs].filter((part) => part && !["()", "[]", "{}"].includes(part)).join(" ");
      const link = `${settings.config.flower}task/${encodeURIComponent(task.uuid)}`;
      return {
        key: task.uuid,
        cells: [
          { text: task.name, make: () => breakable(task.name) },
          { text: task.uuid, class: "code", make: () => element("a", { href: link }, task.uuid) },
          { text: task.state, make: () => mark(STATES[task.state] ?? "idle", task.state) },
          time(task.received),
          time(task.started),
          { text: seconds(task.runtime ?? undefined), class: "number" },
          { text: args || NONE, class: "code", make: () => element("span", { class: "args" }, args || NONE) },
        ],
      };
    }),
    (choice.name || choice.state ? "No task that Flower keeps is like that" : "Flower has seen no task yet") +
      (choice.own ? "" : "; those of the deployment itself are left out"),
  );
  setText($("tasks-count"), whole.format(tasks.length));
  offerNames(tasks.map(({ name }) => name));
}

/** Names to choose from in the filter. */
function offerNames(names) {
  const before = taskNames.size;
  for (const name of names) taskNames.add(name);
  if (taskNames.size === before) return;
  $("names").replaceChildren(...[...taskNames].sort().map((value) => element("option", { value })));
}

// ---- Prometheus: alerts, queues, task types, plots -------------------------------------------------------------------

const gathered = { scraped: new Map(), plotted: 0, plottedRange: 0, step: 0 };

/** The result of an instant query: [{metric, value, time}], without what is not a number. */
async function query(expression) {
  const answer = await ask(`${settings.config.prometheus}api/v1/query?${new URLSearchParams({ query: expression })}`);
  return answer.data.result
    .map(({ metric, value: [time, value] }) => ({ metric, value: Number(value), time }))
    .filter(({ value }) => Number.isFinite(value));
}

/** Seconds since each job was last scraped with success, looked at every 15 s for an hour. */
const SCRAPED = 'time() - max by (job) (max_over_time((time() * (up{job=~"flower|redis"} == 1))[1h:15s]))';
const OURS = '{__name__=~"hothouse:task_.+|hothouse_queue_.+|hothouse_unacked_.+|hothouse_dead_letters|hothouse_unknown_tasks?|' +
  'hothouse_schedulers|hothouse_app|hothouse_hung_service|hothouse_watchdog_restarts_total|hothouse_sentinels|' +
  'hothouse_redis_(primary|primaries|replicas|sentinels)|hothouse_acme_renewal_failed|' +
  'hothouse_restart_needed|hothouse_reboot_needed_since_seconds|' +
  'redis_(up|master_link_up|memory_used_bytes|memory_max_bytes)|haproxy_backend_active_servers"}';
/** What ended within the window, counted as the alerts count it. */
const EVENTS = 'sum by (task, type) (hothouse:flower_events:increase{type=~"task-succeeded|task-failed"})';

async function readPrometheus() {
  const { config } = settings;
  const due = gathered.plottedRange !== choice.range ||
    Date.now() - gathered.plotted >= Math.max(REFRESH, gathered.step) * 1000 - 500;
  const [alerts, scraped, ours, events, plots] = await Promise.all([
    ask(`${config.prometheus}api/v1/alerts`),
    query(SCRAPED),
    query(OURS),
    query(EVENTS),
    due ? readPlots() : null,
  ]);
  gathered.scraped = new Map(scraped.map(({ metric, value }) => [metric.job, value]));
  showAlerts(alerts.data.alerts);
  const series = (name, label) =>
    new Map(ours.filter(({ metric }) => metric.__name__ === name).map(({ metric, value }) => [metric[label] ?? "", value]));
  showTypes({
    succeeded: eventsOf(events, "task-succeeded"),
    failed: eventsOf(events, "task-failed"),
    success: series("hothouse:task_success:ratio", "task"),
    failure: series("hothouse:task_failure:ratio", "task"),
    average: series("hothouse:task_runtime_seconds:avg", "task"),
    p95: series("hothouse:task_runtime_seconds:p95", "task"),
  });
  const messages = series("hothouse_queue_messages", "queue");
  // Without a fresh figure the last one stays, and is shown as old.
  if (messages.size || !scrapeIsOld("redis")) {
    const [unacked] = series("hothouse_unacked_messages", "").values();
    const [unackedOldest] = series("hothouse_unacked_oldest_seconds", "").values();
    showQueues({
      messages,
      oldest: series("hothouse_queue_oldest_seconds", "queue"),
      consumers: series("hothouse_queue_consumers", "queue"),
      unacked,
      unackedOldest,
    });
    showNodes(series);
    showUpkeep(series, (name) => ours.filter(({ metric }) => metric.__name__ === name));
  }
  // The moment that these numbers are of, by the clock of Prometheus.
  for (const id of ["types-table", "queues-table", "upkeep-table"]) if (ours.length) $(id).dataset.time = ours[0].time;
  if (plots) showPlots(plots);
}

const eventsOf = (events, type) =>
  new Map(
    events
      .filter(({ metric }) => metric.type === type && metric.task)
      .map(({ metric, value }) => [metric.task, Math.round(value)]),
  );

/** Prometheus answers, but has not read this job for three rounds. */
function scrapeIsOld(job) {
  const age = gathered.scraped.get(job);
  return age === undefined || age > 3 * Math.max(REFRESH, settings.config.scrape_seconds);
}

let shownAlerts = "";

function showAlerts(alerts) {
  const firing = alerts
    .filter(({ state }) => state === "firing")
    .sort((a, b) => isCritical(b) - isCritical(a) || a.labels.alertname.localeCompare(b.labels.alertname) || a.activeAt.localeCompare(b.activeAt));
  const pending = alerts.filter(({ state }) => state === "pending").length;
  const sign = JSON.stringify([firing.map(({ labels, annotations }) => [labels, annotations]), pending]);
  document.title = `${firing.length ? `(${firing.length}) ` : ""}Hothouse ${settings.config.server_name}`;
  if (sign === shownAlerts) return;
  shownAlerts = sign;
  $("alerts").dataset.level = firing.some(isCritical) ? "bad" : firing.length || pending ? "warn" : "good";
  const soon = pending ? `${plural(pending, "alert")} pending, to fire unless what is wrong ends soon.` : "";
  $("alerts-list").replaceChildren(
    firing.length
      ? element("ul", {}, ...firing.map(alertItem))
      : element("p", {}, mark("good", "No alert is firing."), soon ? ` ${soon}` : ""),
    firing.length && soon ? element("p", {}, element("small", {}, soon)) : "",
  );
}

const isCritical = ({ labels }) => labels.severity !== "warning";

function alertItem(alert) {
  const { labels, annotations, activeAt } = alert;
  const link = annotations.runbook_url && safeLink(annotations.runbook_url);
  const about = Object.entries(labels)
    .filter(([name]) => !["alertname", "severity", "job"].includes(name))
    .map(([, value]) => value)
    .join(", ");
  return element(
    "li", {},
    mark(isCritical(alert) ? "bad" : "warn", labels.alertname),
    element("span", {}, annotations.summary ?? about),
    element("small", {}, `${labels.severity ?? "critical"} since `, timeElement(Date.parse(activeAt) / 1000)),
    link ? element("a", { href: link }, "Runbook", element("span", { class: "unseen" }, ` of ${labels.alertname}`)) : null,
  );
}

/** `oldest` has no figure for a queue whose first message does not say when it was published. */
function showQueues({ messages, oldest, consumers, unacked, unackedOldest }) {
  const { queues, workers, thresholds } = settings.config;
  const rows = queues.map((queue) => {
    const waiting = messages.get(queue);
    const age = oldest.get(queue);
    const up = consumers.get(queue);
    const expected = Object.values(workers).filter((from) => from.includes(queue)).length;
    const long = waiting > thresholds.backlog_messages;
    const late = age > thresholds.backlog_seconds;
    const [level, state] =
      up === 0 ? ["bad", "no consumer"]
      : long ? ["bad", "too long"]
      : late ? ["bad", "too old"]
      : up < expected ? ["warn", "consumer missing"]
      : waiting === undefined ? ["warn", "no figure"]
      : waiting > 0 ? ["good", "working"] : ["good", "empty"];
    return { queue, waiting, age, up, expected, long, late, level, state };
  });
  fillTable(
    $("queues-table"),
    rows.map(({ queue, waiting, age, up, expected, long, late, level, state }) => ({
      key: queue,
      cells: [
        { text: queue, make: () => breakable(queue) },
        { text: state, make: () => mark(level, state) },
        limited(known(waiting) ? whole.format(waiting) : NONE, long),
        limited(waiting === 0 ? NONE : seconds(age), late),
        { text: known(up) ? `${up} of ${expected}` : NONE, class: "number" },
      ],
    })),
    "The inventory has no queues",
  );
  setText(
    $("queues-unacked"),
    known(unacked)
      ? `; ${plural(unacked, "message")} taken and not finished${unacked > 0 ? `, the oldest for ${seconds(unackedOldest)}` : ""}`
      : "",
  );
  const longest = rows.reduce((most, row) => ((row.waiting ?? -1) > (most?.waiting ?? -1) ? row : most), null);
  const wrong = rows.find(({ level }) => level === "bad") ?? rows.find(({ level }) => level === "warn");
  showTile("backlog", {
    name: "Backlog",
    value: longest && known(longest.waiting) ? whole.format(longest.waiting) : NONE,
    level: wrong?.level ?? "good",
    state: wrong ? `${wrong.queue}: ${wrong.state}` : `at most ${whole.format(thresholds.backlog_messages)}`,
    detail: longest?.waiting > 0 ? longest.queue : "in the longest queue",
    source: "queues",
  });
}

/** The nodes of Redis, where there are several. */
function showNodes(series) {
  const { redis_nodes: nodes } = settings.config;
  $("nodes-panel").hidden = nodes.length < 2;
  if (nodes.length < 2) return;
  const figure = (name) => series(name, "instance");
  const [up, primary, replicas, sentinels, link] =
    ["redis_up", "hothouse_redis_primary", "hothouse_redis_replicas", "hothouse_redis_sentinels", "redis_master_link_up"].map(figure);
  const [used, most] = ["redis_memory_used_bytes", "redis_memory_max_bytes"].map(figure);
  fillTable(
    $("nodes-table"),
    nodes.map((node) => {
      const [level, state] =
        !up.has(node) ? ["bad", "not seen"]
        : up.get(node) === 0 ? ["bad", "no answer"]
        : primary.has(node) ? (replicas.get(node) > 0 ? ["good", "primary"] : ["bad", "primary, refuses writes"])
        : replicas.has(node) ? ["bad", "takes itself for the primary"]
        : link.get(node) === 0 ? ["bad", "replica, does not follow"] : ["good", "replica"];
      const share = most.get(node) > 0 ? percent((100 * used.get(node)) / most.get(node)) : NONE;
      return {
        key: node,
        cells: [
          { text: node, make: () => breakable(node) },
          { text: state, make: () => mark(level, state) },
          { text: digits(replicas.get(node)), class: "number" },
          { text: digits(sentinels.get(node)), class: "number" },
          { text: share, class: "number" },
        ],
      };
    }),
    "The inventory has no Redis",
  );
}

/** What is counted and on no other page: dead letters, restarts, schedulers, what Redis is made of, the application's own. */
function showUpkeep(series, of) {
  const { redis_nodes: nodes, app_gauges: gauges, thresholds } = settings.config;
  const only = (name) => series(name, "").values().next().value;

  const hung = of("hothouse_hung_service").map(({ metric }) => `${metric.name} on ${metric.instance}`).sort();
  const restarts = of("hothouse_watchdog_restarts_total").reduce((sum, { value }) => sum + value, 0);
  const beats = only("hothouse_schedulers");
  const rows = [
    {
      ...limitOf(only("hothouse_dead_letters"), thresholds.dead_letters, "set aside"), what: "Dead letters",
      meaning: "Messages that are not tried again: no worker can run them, or whoever took them was killed. To see them: ",
      command: "hothouse-run python -m hothouse_celery dead-letters",
    },
    {
      ...limitOf(only("hothouse_unknown_tasks"), 0, "set aside"), what: "Unknown tasks",
      meaning: `Messages of tasks that no release knows. ${counted(series("hothouse_unknown_task", "task"))}When one knows them: `,
      command: "hothouse-run python -m hothouse_celery dead-letters --requeue --unknown",
    },
    {
      what: "Watchdog restarts", level: hung.length ? "warn" : "good", number: digits(restarts),
      state: hung.length ? "of late" : restarts ? "none of late" : "none",
      meaning: `Services that lived, but did not work any more. ${hung.join(", ")}`.trim(),
    },
    {
      what: "Schedulers", level: beats > 1 ? "warn" : beats === 1 ? "good" : "idle", number: digits(beats),
      state: beats > 1 ? "more than one" : beats === 1 ? "one" : "none",
      meaning: "Beats that schedule; all but one stand by.",
    },
  ];

  if (nodes.length > 1) {
    const [primary] = series("hothouse_redis_primary", "instance").keys();
    const primaries = only("hothouse_redis_primaries");
    const failovers = known(primaries) ? primaries - 1 : undefined;
    rows.push(
      {
        ...shareOf(series("hothouse_redis_replicas", "instance").get(primary), nodes.length - 1, 1, "all follow"),
        what: "Redis replicas", meaning: "Copies of the primary; without any it refuses writes.",
      },
      {
        ...shareOf(only("hothouse_sentinels"), nodes.length, Math.floor(nodes.length / 2) + 1, "all watch"),
        what: "Sentinels", meaning: "Most of them have to agree before another node becomes the primary.",
      },
      {
        what: "Redis failovers", level: failovers ? "warn" : known(failovers) ? "good" : "idle", number: digits(failovers),
        state: failovers ? "of late" : known(failovers) ? "none of late" : "no figure",
        meaning: "Nodes that lost the role of the primary to another one.",
      },
    );
  }
  const ways = of("haproxy_backend_active_servers").filter(({ metric }) => metric.proxy === "redis");
  if (ways.length) {
    rows.push({
      ...shareOf(ways.filter(({ value }) => value > 0).length, ways.length, ways.length, "all open"),
      what: "Ways to Redis", meaning: "Hosts that reach the primary.",
    });
  }
  const renewals = of("hothouse_acme_renewal_failed");
  if (renewals.length) {
    const failing = renewals.filter(({ value }) => value > 0).map(({ metric }) => metric.instance).sort();
    rows.push({
      what: "Certificate renewal", level: failing.length ? "warn" : "good", number: digits(failing.length),
      state: failing.length ? "failing" : "none failed",
      meaning: `Hosts whose last attempt at the certificate of these pages failed. ${failing.join(", ")}`.trim(),
    });
  }
  const reboots = of("hothouse_reboot_needed_since_seconds");
  if (reboots.length) {
    const old = of("hothouse_restart_needed").map(({ metric }) => `${metric.name} on ${metric.instance}`).sort();
    const waiting = reboots.filter(({ value }) => value > 0).map(({ metric }) => metric.instance).sort();
    rows.push(
      {
        what: "Services to restart", level: old.length ? "warn" : "good", number: digits(old.length),
        state: old.length ? "run old code" : "none",
        meaning: `An update replaced what they run. ${old.join(", ")}`.trim(),
      },
      {
        what: "Hosts to reboot", level: waiting.length ? "warn" : "good", number: digits(waiting.length),
        state: waiting.length ? "waiting" : "none",
        meaning: `An update, mostly of the kernel, wants it. ${waiting.join(", ")}`.trim(),
      },
    );
  }
  const values = series("hothouse_app", "name");
  for (const { name, help, alert_above: limit } of gauges) {
    const words = name.replaceAll("_", " ");
    rows.push({ ...limitOf(values.get(name), limit, "too many"), what: words[0].toUpperCase() + words.slice(1), meaning: help });
  }

  fillTable(
    $("upkeep-table"),
    rows.map(({ what, level, state, number, over = false, meaning, command }) => ({
      key: what,
      cells: [
        { text: what },
        { text: state, sign: `${level}${state}`, make: () => mark(level, state) },
        limited(number, over),
        {
          text: `${meaning}${command ?? ""}`,
          make: () => element("span", {}, meaning, command ? element("span", { class: "code" }, command) : ""),
        },
      ],
    })),
    "",
  );
}

/** Names with their counts, the most frequent first, as a sentence. */
function counted(counts) {
  const all = [...counts].sort(([one, many], [other, more]) => more - many || one.localeCompare(other));
  const said = all.slice(0, NAMED).map(([name, count]) => `${name} (${whole.format(count)})`);
  if (all.length > NAMED) said.push("others");
  return said.length ? `${said.join(", ")}. ` : "";
}

/** State and number of something of which there may be `limit`; undefined is no limit. */
function limitOf(value, limit, excess) {
  const over = value > limit;
  const state = !known(value) ? "no figure" : over ? excess : value > 0 ? "some" : "none";
  return { over, state, level: !known(value) ? "idle" : over ? "warn" : "good", number: digits(value) };
}

/** State and number of something of which there should be `all`, and has to be `least`. */
function shareOf(found, all, least, complete) {
  const [level, state] = !known(found) ? ["warn", "no figure"]
    : found >= all ? ["good", complete] : found >= least ? ["warn", "some missing"] : ["bad", found ? "too few" : "none"];
  return { level, state, number: `${known(found) ? found : NONE} of ${all}` };
}

/** A cell with a number that has a limit. */
const limited = (text, over, more = "") => ({
  text: text + more,
  sign: `${text}${more}${over}`,
  class: "number",
  make: () => element("span", over ? { class: "over" } : {}, text, more ? element("small", {}, more) : ""),
});

function showTypes({ succeeded, failed, success, failure, average, p95 }) {
  const { thresholds } = settings.config;
  const limits = new Map(Object.entries(thresholds.runtime_seconds));
  const names = [...new Set([...succeeded.keys(), ...failed.keys(), ...average.keys()])].filter(Boolean).filter(isShown).sort();
  const rows = names.map((name) => {
    const failures = failed.get(name) ?? 0;
    const runs = (succeeded.get(name) ?? 0) + failures;
    const row = {
      name, runs, failures, limit: limits.get(name),
      success: scale(success.get(name)), failure: scale(failure.get(name)),
      average: average.get(name), p95: p95.get(name),
    };
    row.low = row.success < thresholds.success_percent;
    row.failing = row.failure > thresholds.failure_percent;
    row.slow = row.average > row.limit;
    return row;
  });
  fillTable(
    $("types-table"),
    rows.map((row) => {
      const [level, state] = verdict(row);
      return {
        key: row.name,
        cells: [
          { text: row.name, make: () => breakable(row.name) },
          { text: state, make: () => mark(level, state) },
          { text: whole.format(row.runs), class: "number" },
          limited(row.runs ? percent(row.success) : NONE, row.low),
          failuresCell(row),
          limited(seconds(row.average), row.slow, row.limit === undefined ? "" : ` ≤ ${seconds(row.limit)}`),
          { text: seconds(row.p95), class: "number" },
        ],
      };
    }),
    "No task ended in this time",
  );
  offerNames(names);
  showTypeTiles(rows);
}

const scale = (ratio) => (known(ratio) ? 100 * ratio : undefined);

function verdict({ runs, low, failing, slow }) {
  const words = [low ? "success too low" : failing ? "failures" : "", slow ? "too slow" : ""].filter(Boolean);
  if (words.length) return [low || slow ? "bad" : "warn", words.join(", ")];
  return runs ? ["good", "fine"] : ["idle", "no runs"];
}

/** The number of failures, which shows them below when it is pressed. */
function failuresCell({ name, runs, failures, failure, failing }) {
  const count = whole.format(failures);
  const share = runs ? percent(failure) : NONE;
  return {
    text: `${count} ${share}`,
    sign: `${count} ${share} ${failing}`,
    class: "number",
    make: () =>
      element(
        "span", failing ? { class: "over" } : {},
        failures
          ? element("button", { type: "button", class: "plain", onclick: () => filterBy(name, "FAILURE") }, count,
              element("span", { class: "unseen" }, ` failures of ${name}, show them`))
          : count,
        failures ? element("small", {}, ` ${share}`) : "",
      ),
  };
}

function showTypeTiles(rows) {
  const { thresholds, window_seconds: window } = settings.config;
  const runs = rows.reduce((sum, row) => sum + row.runs, 0);
  const failures = rows.reduce((sum, row) => sum + row.failures, 0);
  const success = runs ? (100 * (runs - failures)) / runs : undefined;
  const failure = runs ? (100 * failures) / runs : undefined;
  const low = success < thresholds.success_percent;
  const failing = failure > thresholds.failure_percent;
  const inTypes = (kind) => rows.filter((row) => row[kind]).map(({ name }) => name).join(", ");
  showTile("success", {
    name: "Success rate",
    value: percent(success),
    level: low || inTypes("low") ? "bad" : runs ? "good" : "idle",
    state: low ? `below ${thresholds.success_percent} %`
      : inTypes("low") ? `low: ${inTypes("low")}` : runs ? `at least ${thresholds.success_percent} %` : "no runs",
    detail: `${plural(runs, "run")} in ${seconds(window)}`,
    source: "types",
  });
  showTile("failures", {
    name: "Failures",
    value: runs ? percent(failure) : NONE,
    level: failing || inTypes("failing") ? "bad" : runs ? "good" : "idle",
    state: failing ? `above ${thresholds.failure_percent} %`
      : inTypes("failing") ? `many: ${inTypes("failing")}` : runs ? `at most ${thresholds.failure_percent} %` : "no runs",
    detail: `${whole.format(failures)} of ${plural(runs, "run")}`,
    source: "types",
  });
  // Of the tasks with a limit, the one nearest to it.
  const [worst] = rows
    .filter(({ limit, average }) => limit !== undefined && known(average))
    .sort((a, b) => b.average / b.limit - a.average / a.limit);
  const [task, limit] = worst ? [worst.name, worst.limit] : (Object.entries(thresholds.runtime_seconds)[0] ?? []);
  if (task === undefined) return;
  showTile("runtime", {
    name: "Average runtime",
    value: seconds(worst?.average),
    level: !worst ? "idle" : worst.slow ? "bad" : "good",
    state: !worst ? "no runs" : worst.slow ? `above ${seconds(limit)}` : `at most ${seconds(limit)}`,
    detail: task,
    source: "types",
  });
}

const TILES = ["workers", "success", "failures", "runtime", "backlog"];

/** One number of the strip at the top; `source` is the section that it is as old as. */
function showTile(id, { name, value, level, state, detail, source }) {
  let tile = $(`tile-${id}`);
  if (!tile) {
    tile = element("div", { id: `tile-${id}` }, element("dt"), element("dd", { class: "value" }),
      element("dd"), element("dd", { class: "detail" }));
    const later = TILES.slice(TILES.indexOf(id) + 1).map((other) => $(`tile-${other}`)).find(Boolean);
    $("tiles").insertBefore(tile, later ?? null);
  }
  tile.dataset.level = level;
  tile.dataset.source = source;
  const [title, number, verdictPlace, more] = tile.children;
  setText(title, name);
  setText(number, value);
  if (verdictPlace.dataset.sign !== level + state) {
    verdictPlace.dataset.sign = level + state;
    verdictPlace.replaceChildren(mark(level, state));
  }
  if (more.textContent !== detail) more.replaceChildren(breakable(detail));
}

// ---- Plots -------------------------------------------------------------------------------------------------------

const drawn = new Map(); // id of a plot → {chart, figure, series, alone}
// Name → number of its colour, the same in every plot.
const colours = { task: new Map(), queue: new Map() };

/** What Grafana replaces in an expression, replaced as it does it, but for rates over less than CALM. */
function concrete(expression, step) {
  const { scrape_seconds: scrape } = settings.config;
  return expression
    .replaceAll("$__rate_interval", `${Math.max(CALM, step + scrape)}s`)
    .replaceAll("$__interval", `${step}s`);
}

const fillIn = (legend, labels) => legend.replace(/\{\{\s*(\w+)\s*\}\}/g, (_, name) => labels[name] ?? "");

/** The lines of every plot over the chosen range, all on the same points in time. */
async function readPlots() {
  const { range } = choice;
  const step = Math.max(settings.config.scrape_seconds, Math.ceil(range / POINTS / 5) * 5);
  const end = Math.floor(Date.now() / 1000 / step) * step;
  const start = end - Math.floor(range / step) * step;
  const times = Array.from({ length: (end - start) / step + 1 }, (_, index) => start + index * step);
  const plots = await Promise.all(
    settings.plots.map(async (plot) => {
      const [lines, limits] = await Promise.all([
        Promise.all(plot.series.map((series) => readLines(series, { start, end, step, times }))),
        Promise.all(plot.thresholds.map(readLimits)),
      ]);
      return { plot, lines: lines.flat(), limits: limits.flat() };
    }),
  );
  return { range, step, times, plots };
}

async function readLines({ expr, legend, dashed = false }, { start, end, step, times }) {
  const parameters = new URLSearchParams({ query: concrete(expr, step), start, end, step });
  const answer = await ask(`${settings.config.prometheus}api/v1/query_range?${parameters}`);
  return answer.data.result.map(({ metric, values }) => {
    const line = new Array(times.length).fill(null);
    for (const [time, text] of values) {
      const value = Number(text);
      if (Number.isFinite(value)) line[Math.round((time - start) / step)] = value;
    }
    const kind = metric.queue === undefined ? "task" : "queue";
    return { kind, name: metric[kind] ?? "", legend: fillIn(legend, metric), dashed, values: line };
  }).filter(({ kind, name }) => kind !== "task" || isShown(name));
}

async function readLimits({ expr, legend }) {
  return (await query(expr)).map(({ metric, value }) => ({
    legend: fillIn(legend, metric), value,
  }));
}

const extremes = (values) => {
  const there = values.filter((value) => value !== null);
  return there.length ? [Math.min(...there), Math.max(...there)] : [undefined, undefined];
};
const lastOf = (values) => values.findLast((value) => value !== null);

function showPlots({ range, step, times, plots }) {
  Object.assign(gathered, { plotted: Date.now(), plottedRange: range, step });
  const all = plots.flatMap(({ lines }) => lines).sort((a, b) => a.name.localeCompare(b.name));
  for (const line of all) {
    const given = colours[line.kind];
    if (!given.has(line.name)) given.set(line.name, given.size % LINES);
    line.colour = given.get(line.name);
  }
  for (const { plot, lines, limits } of plots) showPlot(plot, { range, times, lines, limits });
}

function showPlot(plot, { range, times, lines, limits }) {
  // More lines than colours: those that rise highest.
  const all = lines.filter(({ values }) => values.some((value) => value !== null));
  const most = [...all].sort((a, b) => extremes(b.values)[1] - extremes(a.values)[1]).slice(0, LINES * plot.series.length);
  const shown = all.filter((line) => most.includes(line)).sort((a, b) => a.legend.localeCompare(b.legend));
  let view = drawn.get(plot.id);
  if (!view) {
    view = makeFigure(plot);
    drawn.set(plot.id, view);
  }
  Object.assign(view, { shown, limits, times, range, left: all.length - shown.length });
  view.link.href = `${settings.config.prometheus}graph?${new URLSearchParams({
    "g0.expr": concrete(plot.series[0].expr, 15), "g0.tab": "0", "g0.range_input": `${range / 3600}h`,
  })}`;
  if (!shown.some(({ legend }) => legend === view.alone)) view.alone = null;
  const format = UNITS[plot.unit] ?? digits;
  fillTable(
    view.table,
    shown.map(({ legend, colour, dashed, values }) => {
      const [low, high] = extremes(values);
      const pressed = view.alone === legend;
      return {
        key: legend,
        cells: [
          { text: legend, sign: `${legend}${colour}${pressed}`, make: () => legendButton(view, { legend, colour, dashed, pressed }) },
          { text: format(lastOf(values)), class: "number" },
          { text: format(low), class: "number" },
          { text: format(high), class: "number" },
        ],
      };
    }),
    "No figures in this time",
  );
  dimRows(view);
  const limit = limits.map(({ legend, value }) => `${format(value)} (${legend})`).join(", ");
  setText(
    view.limit,
    [limit && `Limit: ${limit}; the dashed line, where it is in sight.`, view.left && `${view.left} more lines are in Prometheus.`]
      .filter(Boolean).join(" "),
  );
  view.limit.hidden = view.limit.textContent === "";
  draw(view);
}

function legendButton(view, { legend, colour, dashed, pressed }) {
  return element(
    "button",
    {
      type: "button", class: "plain", "aria-pressed": String(pressed),
      onclick: (event) => {
        view.alone = view.alone === legend ? null : legend;
        for (const button of view.table.querySelectorAll("tbody button")) button.setAttribute("aria-pressed", "false");
        event.currentTarget.setAttribute("aria-pressed", String(view.alone === legend));
        dimRows(view);
        draw(view);
      },
    },
    element("span", { class: `swatch s${colour}${dashed ? " dashed" : ""}` }),
    breakable(legend),
  );
}

function dimRows(view) {
  for (const row of view.table.tBodies[0].rows) {
    row.classList.toggle("dimmed", view.alone !== null && row.dataset.key !== view.alone);
  }
}

function makeFigure(plot) {
  const column = (text, kind) => element("th", { role: "columnheader", scope: "col", class: kind }, text);
  const head = element("tr", { role: "row" }, column("Line"), column("Last", "number"), column("Lowest", "number"), column("Highest", "number"));
  const table = element(
    "table", { role: "table", id: `plot-${plot.id}-table`, "data-first": "3", "data-plain": "" },
    element("caption", { class: "unseen" }, `${plot.title}, ${plot.unit}`),
    element("thead", { role: "rowgroup" }, head),
    element("tbody", { role: "rowgroup" }),
  );
  const area = element("div", {
    class: "plot", role: "img", "aria-label": `Plot over time: ${plot.title}, ${plot.unit}. The table after it has its figures.`,
  });
  const link = element("a", {}, "in Prometheus", element("span", { class: "unseen" }, `: ${plot.title}`));
  const limit = element("p", { class: "limit", hidden: true });
  const figure = element(
    "figure", { id: `plot-${plot.id}` },
    element("figcaption", {}, element("span", {}, element("strong", {}, plot.title), " ", element("small", {}, plot.unit)), link),
    area, table, limit,
  );
  $("figures").append(figure);
  const view = { plot, figure, area, table, link, limit, head, alone: null, chart: null };
  new ResizeObserver(() => view.chart?.setSize({ width: area.clientWidth, height: 170 })).observe(area);
  return view;
}

const colourOf = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

/** Draw a figure's lines. A chart is made anew only when its lines, their order or the colours are others. */
function draw(view) {
  const { plot, shown, limits, times } = view;
  const shape = JSON.stringify([shown.map(({ legend, colour }) => [legend, colour]), view.alone, view.range]);
  const data = [times, ...shown.map(({ values }) => values)];
  if (view.chart && view.shape === shape) {
    view.chart.setData(data);
    return;
  }
  view.chart?.destroy();
  view.shape = shape;
  const format = UNITS[plot.unit] ?? digits;
  const axis = {
    stroke: colourOf("--muted"), font: "12px system-ui, sans-serif",
    grid: { stroke: colourOf("--line"), width: 1 }, ticks: { show: false },
  };
  view.chart = new uPlot(
    {
      width: view.area.clientWidth,
      height: 170,
      legend: { show: false },
      cursor: { drag: { x: false, y: false }, points: { size: 6 }, sync: { key: "overview" } },
      padding: [8, 8, 0, 0],
      scales: { y: { range: (_, __, highest) => [0, upperEnd(highest, view.limits, plot.unit)] } },
      axes: [
        { ...axis, size: 28, space: 60, values: (_, marks) => marks.map((unix) => timeMark(unix, view.range)) },
        { ...axis, size: 62, space: 34, values: (_, marks) => marks.map(format) },
      ],
      series: [
        {},
        ...shown.map(({ legend, colour, dashed }) => {
          const dim = view.alone !== null && view.alone !== legend;
          return {
            label: legend,
            stroke: dim ? colourOf("--line") : colourOf(`--s${colour}`),
            width: view.alone === legend ? 2.5 : 1.5,
            dash: dashed ? [2, 3] : undefined,
            points: { size: 4 },
          };
        }),
      ],
      hooks: {
        draw: [(chart) => drawLimits(chart, view.limits)],
        setCursor: [(chart) => showAtCursor(view, chart.cursor.idx)],
      },
    },
    data,
    view.area,
  );
}

/** The top of a plot: above what is in it, and above a limit that comes near or is small anyway. */
function upperEnd(highest, limits, unit) {
  const near = limits.map(({ value }) => value).filter((value) => highest > value / 2 || (unit === "percent" && value < 10));
  return 1.1 * Math.max(highest ?? 0, ...near) || 1;
}

function timeMark(unix, range) {
  const date = new Date(unix * 1000);
  const midnight = date.getHours() === 0 && date.getMinutes() === 0;
  return midnight && range > 21600 ? days.format(date) : minutes.format(date);
}

function drawLimits(chart, limits) {
  const { ctx } = chart;
  ctx.save();
  ctx.lineWidth = devicePixelRatio;
  ctx.strokeStyle = colourOf("--bad");
  ctx.setLineDash([6 * devicePixelRatio, 4 * devicePixelRatio]);
  for (const { value } of limits) {
    if (value > chart.scales.y.max) continue;
    const y = chart.valToPos(value, "y", true);
    ctx.beginPath();
    ctx.moveTo(chart.bbox.left, y);
    ctx.lineTo(chart.bbox.left + chart.bbox.width, y);
    ctx.stroke();
  }
  ctx.restore();
}

/** Under the pointer the column "Last" says the values of that time, in all plots. */
function showAtCursor(view, index) {
  const format = UNITS[view.plot.unit] ?? digits;
  const pointed = index !== null && index !== undefined;
  setText(view.head.cells[1], pointed ? moment(view.times[index]) : "Last");
  view.shown.forEach(({ values }, row) => {
    const cell = view.table.tBodies[0].rows[row]?.cells[1];
    if (!cell) return;
    const text = format(pointed ? (values[index] ?? undefined) : lastOf(values));
    cell.dataset.sign = text;
    setText(cell, text);
  });
}

// ---- How old it is -----------------------------------------------------------------------------------------------

/** What each section rests on, and what it means when that is missing. */
const SECTIONS = {
  workers: { source: flower, title: "Workers" },
  tasks: { source: flower, title: "Recent tasks" },
  queues: { source: prometheus, title: "Queues", job: "redis" },
  types: { source: prometheus, title: "Task types", job: "flower" },
  upkeep: { source: prometheus, title: "Upkeep", job: "redis" },
  plots: { source: prometheus, title: "Plots", job: "flower" },
};
const MEANING = {
  Flower: "Workers and tasks go on without it; only the view of them is missing.",
  Prometheus: "Until it is back no alert is found or sent.",
  flower: "What ends in this time is not in rates, runtimes and plots.",
  redis: "What waits in the queues is not known.",
};

/** What is wrong with what a section shows, or null. */
function complaint({ source, job }) {
  const asOf = source.lastRead === null ? "Nothing could be read yet." : `The numbers are from ${moment(source.lastRead / 1000)}.`;
  if (source.state === "unreachable") {
    return { level: "bad", text: `${source.name} cannot be reached since ${moment(source.failedAt / 1000)}: ${source.error}. ${asOf} ${MEANING[source.name]}` };
  }
  if (source.state === "stale") return { level: "warn", text: `Old numbers: ${source.name} was last read at ${moment(source.lastRead / 1000)}.` };
  if (job && source.state === "fresh" && scrapeIsOld(job)) {
    const age = gathered.scraped.get(job);
    const name = job === "flower" ? "Flower" : "the exporter of Redis";
    return { level: "warn", text: `Old numbers: Prometheus could not read ${name} ${age === undefined ? "in the last hour" : `for ${seconds(age)}`}. ${MEANING[job]}` };
  }
  return null;
}

function showFreshness() {
  const { config } = settings;
  if (!config) return;
  for (const [id, section] of Object.entries(SECTIONS)) {
    const basis = config.prometheus || section.source === flower ? section : id === "queues" ? { source: flower } : null;
    if (!basis) continue; // said once and for all in withoutPrometheus()
    const wrong = complaint(basis);
    const notice = $(`${id}-notice`);
    // Where two parts of one section miss the same source, the first says so.
    const repeated = id === "queues" && !config.prometheus;
    notice.hidden = !wrong || repeated;
    notice.className = wrong?.level === "bad" ? "notice bad" : "notice";
    setText(notice, wrong?.text ?? "");
    const old = wrong !== null;
    for (const part of [$(`${id}-panel`), id === "plots" ? $("figures") : null]) if (part) part.dataset.old = old;
    for (const tile of document.querySelectorAll(`#tiles > [data-source="${id}"]`)) tile.dataset.old = old;
  }
  if (config.prometheus && prometheus.state !== "fresh" && prometheus.state !== "waiting") {
    const text = `Alerts are not known: Prometheus ${prometheus.state === "stale" ? "was not read for a while" : "cannot be reached"}.`;
    if (shownAlerts !== text) {
      shownAlerts = text;
      $("alerts").dataset.level = "bad";
      $("alerts-list").replaceChildren(element("p", {}, mark("bad", text)));
      document.title = `(?) Hothouse ${config.server_name}`;
    }
  }
  const sources = config.prometheus ? [flower, prometheus] : [flower];
  while ($("sources").children.length < sources.length) $("sources").append(element("li"));
  sources.forEach((source, index) => showSource($("sources").children[index], source));
}

const LEVELS = { fresh: "good", stale: "warn", unreachable: "bad", waiting: "idle" };

function showSource(item, source) {
  const read = source.lastRead === null ? "not read yet" : `read ${moment(source.lastRead / 1000)}`;
  const age = source.age >= 3 && known(source.age) ? `, ${seconds(Math.floor(source.age))} ago` : "";
  const state = source.state === "fresh" || source.state === "waiting" ? "" : `${source.state}, `;
  item.dataset.state = source.state;
  const text = `${source.name}: ${state}${read}${age}`;
  if (item.textContent !== text) item.replaceChildren(mark(LEVELS[source.state], text));
}

// ---- The page ----------------------------------------------------------------------------------------------------

function withoutPrometheus() {
  const none = "This environment has no monitor host (its group monitor is empty)";
  setText($("types-notice"), `${none}: nothing records runs, success rates and runtimes. The list of tasks below, and Flower, have single tasks.`);
  setText($("upkeep-notice"), `${none}: nothing watches what may need a hand.`);
  setText($("plots-notice"), `${none}: nothing is recorded over time.`);
  $("alerts-list").replaceChildren(element("p", {}, mark("idle", `${none}: no alert is found or sent.`)));
  for (const id of ["types-notice", "upkeep-notice", "plots-notice"]) $(id).hidden = false;
  for (const id of ["types-panel", "upkeep-panel", "figures", "ranges"]) $(id).hidden = true;
}

/** The choices stand in the address, so that it can be sent to somebody. */
function rememberChoices() {
  const parameters = new URLSearchParams();
  if (choice.range !== 3600) parameters.set("range", choice.range);
  if (choice.name) parameters.set("name", choice.name);
  if (choice.state) parameters.set("state", choice.state);
  if (choice.own) parameters.set("deployment", "1");
  if (choice.whole.size) parameters.set("whole", [...choice.whole].join(","));
  const text = parameters.toString();
  history.replaceState(null, "", text ? `?${text}` : location.pathname);
}

function recallChoices() {
  const parameters = new URLSearchParams(location.search);
  const range = document.querySelector(`#ranges [value="${Number(parameters.get("range")) || 3600}"]`);
  if (range) {
    range.checked = true;
    choice.range = Number(range.value);
  }
  $("filter-name").value = choice.name = parameters.get("name") ?? "";
  $("filter-state").value = parameters.get("state") ?? "";
  choice.state = $("filter-state").value;
  $("own").checked = choice.own = parameters.get("deployment") === "1";
  for (const id of parameters.get("whole")?.split(",") ?? []) choice.whole.add(id);
}

let typing = 0;

function filterChanged() {
  choice.name = $("filter-name").value.trim();
  choice.state = $("filter-state").value;
  rememberChoices();
  showTasks();
  clearTimeout(typing);
  typing = setTimeout(() => flower.poke(), 300);
}

/** Show the tasks of a name and a state, and go there. */
function filterBy(name, state) {
  $("filter-name").value = name;
  $("filter-state").value = state;
  filterChanged();
  $("filter-state").focus();
}

function listen() {
  $("filter").addEventListener("submit", (event) => event.preventDefault());
  $("filter").addEventListener("input", filterChanged);
  $("ranges").addEventListener("change", (event) => {
    choice.range = Number(event.target.value);
    rememberChoices();
    prometheus.poke();
  });
  const sources = settings.config.prometheus ? [flower, prometheus] : [flower];
  $("own").addEventListener("change", (event) => {
    choice.own = event.target.checked;
    rememberChoices();
    taskNames.clear();
    gathered.plottedRange = 0; // draws the plots anew
    for (const source of sources) source.poke();
  });
  document.addEventListener("visibilitychange", () => {
    for (const source of sources) {
      clearTimeout(source.timer);
      if (!document.hidden) source.poke();
    }
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    for (const view of drawn.values()) {
      view.shape = null;
      draw(view);
    }
  });
  setInterval(() => !document.hidden && showFreshness(), 1000);
  for (const source of sources) source.poke();
}

async function begin() {
  try {
    [settings.config, settings.plots] = await Promise.all([ask("config.json"), ask("plots.json")]);
  } catch (error) {
    $("broken").hidden = false;
    setText($("broken"), `The settings of this page could not be read: ${error.message}. Trying again every ${REFRESH} s.`);
    setTimeout(begin, REFRESH * 1000);
    return;
  }
  const { config } = settings;
  $("broken").hidden = true;
  setText($("server"), config.server_name);
  document.title = `Hothouse ${config.server_name}`;
  $("link-flower").href = config.flower;
  if (config.prometheus) {
    $("link-prometheus").href = config.prometheus;
    for (const id of ["link-prometheus", "link-alerts"]) $(id).hidden = false;
  } else withoutPrometheus();
  setText($("window"), seconds(config.window_seconds));
  setText($("limit-messages"), `≤ ${whole.format(config.thresholds.backlog_messages)}`);
  setText($("limit-seconds"), `≤ ${seconds(config.thresholds.backlog_seconds)}`);
  setText($("limit-success"), `≥ ${config.thresholds.success_percent} %`);
  setText($("limit-failures"), `≤ ${config.thresholds.failure_percent} %`);
  recallChoices();
  listen();
}

begin();
