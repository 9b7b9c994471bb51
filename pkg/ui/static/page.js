// The page of "streamshim ui". What comes from containers and users (names, commands, terminals) is only set as text or
// written to a terminal emulator.
"use strict";

const pollInterval = 1000, recordingsInterval = 10000, points = 120;
const reconnects = 20, reconnectPause = 500; // of a watch that a hand-over has ended; the pause is in ms
// Limits: columns and rows of a terminal, which may claim 65535; one number in a command to the terminal; characters written
// to it at once; rows of a table.
const most = { columns: 500, rows: 200, repeats: 1000, piece: 4096, listed: 500 };
const smallestFont = 9; // of a terminal, in pixels
const wide = 0.605; // width of a character, in sizes of its font
const find = (id) => document.getElementById(id);
const state = { sessions: null, recordings: null, last: null, watching: null, ending: null, player: null };

class Refused extends Error {
  constructor(message, status) { super(message); this.status = status; }
}

async function call(path, options = {}) {
  const secret = sessionStorage.getItem("secret");
  let response;
  try {
    response = await fetch("/api/" + path, { ...options, headers: secret ? { Authorization: "Bearer " + secret } : {} });
  } catch (problem) {
    if (options.signal?.aborted) throw problem;
    throw new Refused("“streamshim ui” does not answer. It may have been ended.", 0);
  }
  if (!response.ok) {
    let message = response.statusText;
    try { message = (await response.json()).error || message; } catch { /* not an error of this server */ }
    throw new Refused(message, response.status);
  }
  return response;
}

const token = () => new URLSearchParams(location.hash.slice(1)).get("token");

// signIn exchanges the token in the address for the secret of this tab.
async function signIn() {
  if (!token()) return;
  try {
    const answer = await (await call("sign-in", { method: "POST", body: token() })).json();
    sessionStorage.setItem("secret", answer.secret);
  } catch (problem) {
    if (problem.status !== 401) return; // the address keeps its token, so loading the page again tries again
  }
  history.replaceState(null, "", "/");
}

function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

// plain writes characters that are invisible or reverse text (U+202E) as numbers.
function plain(text) {
  return String(text ?? "").replace(/[\p{Cc}\p{Cf}\p{Zl}\p{Zp}\p{Co}\p{Cs}]/gu, (c) => "\\u" + c.codePointAt(0).toString(16).padStart(4, "0"));
}

function bytes(n) {
  let unit = 0;
  while (n >= 1024 && unit < 4) { n /= 1024; unit++; }
  return (unit && n < 10 ? n.toFixed(1) : Math.round(n)) + " " + ["B", "KiB", "MiB", "GiB", "TiB"][unit];
}

function age(seconds) {
  if (seconds < 120) return Math.floor(seconds) + " s";
  if (seconds < 7200) return Math.floor(seconds / 60) + " min";
  if (seconds < 172800) return Math.floor(seconds / 3600) + " h";
  return Math.floor(seconds / 86400) + " d";
}

const place = (item) => [item.pod_namespace, item.pod_name, item.container].filter(Boolean).map(plain).join(" / ") || "(no pod)";
const commandOf = (s) => plain((s.command || []).join(" "));

// Figures are small plots of the last two minutes. They are made at the start, so that nothing moves later.
const rate = (n) => bytes(n) + "/s";
const figures = {
  sessions: { name: "Live sessions", show: String },
  input: { name: "To pods", show: rate },
  output: { name: "From pods", show: rate },
  calls: { name: "CRI calls", show: (n) => n.toFixed(1) + "/s", metric: true },
  memory: { name: "Memory of streamshim", show: bytes, metric: true },
  cpu: { name: "CPU of streamshim", show: (n) => (100 * n).toFixed(1) + " %", metric: true },
};

function makeFigures() {
  const svg = (name, attributes) => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    return made;
  };
  for (const [key, f] of Object.entries(figures)) {
    f.history = [];
    f.value = element("b", { textContent: "–" });
    f.most = element("span", { className: "most" });
    f.area = svg("path", { class: "area" });
    f.path = svg("path", {});
    const plot = svg("svg", { viewBox: "0 0 " + (points - 1) + " 32", preserveAspectRatio: "none", "aria-hidden": "true" });
    plot.append(f.area, f.path);
    find("figures").append(element("div", { className: "figure", id: "figure-" + key },
      element("span", { className: "name", textContent: f.name }), element("div", { className: "line" }, f.value, f.most), plot));
  }
}

function figure(key, value, without) {
  const f = figures[key];
  if (!Number.isFinite(value)) {
    f.value.textContent = "–";
    f.most.textContent = without || "";
    return;
  }
  f.history.push(value);
  if (f.history.length > points) f.history.shift();
  const top = Math.max(...f.history), start = points - f.history.length;
  f.value.textContent = f.show(value);
  f.most.textContent = "max " + f.show(top);
  const line = f.history.map((v, n) => (start + n) + " " + (30 - (v / (top || 1)) * 28).toFixed(1)).join("L");
  f.path.setAttribute("d", "M" + line);
  f.area.setAttribute("d", "M" + start + " 32L" + line + "L" + (points - 1) + " 32Z");
}

// sum adds up a metric over its labels. It returns NaN if there is no such metric.
function sum(text, name) {
  let total = NaN;
  for (const [, value] of text.matchAll(new RegExp("^" + name + "(?:\\{[^\\n]*\\})? ([0-9.eE+-]+)", "gm"))) {
    total = (Number.isNaN(total) ? 0 : total) + Number(value);
  }
  return total;
}

function drawFigures(sessions, metrics) {
  const now = performance.now() / 1000, before = state.last, passed = before ? now - before.at : 1;
  let input = 0, output = 0;
  for (const s of sessions) {
    const was = before?.bytes.get(s.id) || { in: 0, out: 0 };
    if (!before) continue;
    input += Math.max(0, s.bytes_in - was.in);
    output += Math.max(0, s.bytes_out - was.out);
  }
  figure("sessions", sessions.length);
  figure("input", input / passed);
  figure("output", output / passed);
  const without = metrics === "" ? "metrics are off" : metrics === null ? "no answer" : "";
  // A program that has just taken over has no calls yet.
  const text = metrics || "", calls = text && (sum(text, "streamshim_cri_calls_total") || 0), cpu = sum(text, "process_cpu_seconds_total");
  figure("calls", text ? Math.max(0, (calls - before?.calls) / passed) : NaN, without);
  figure("cpu", Math.max(0, (cpu - before?.cpu) / passed), without);
  figure("memory", sum(text, "process_resident_memory_bytes"), without);
  state.last = { at: now, cpu, calls, bytes: new Map(sessions.map((s) => [s.id, { in: s.bytes_in, out: s.bytes_out }])) };
}

// rows fills a table. It keeps rows by their keys and changes them in place, so that the focus and what is read stay in place.
function rows(body, items, key, cells, acts) {
  const kept = new Map([...body.children].map((row) => [row.dataset.key, row]));
  const wanted = new Set(items.map(key));
  const focused = document.activeElement?.closest?.("tr");
  const lost = focused?.parentNode === body && !wanted.has(focused.dataset.key) ? [...body.children].indexOf(focused) : -1;
  for (const [id, row] of kept) if (!wanted.has(id)) row.remove();
  items.forEach((item, at) => {
    let row = kept.get(key(item));
    if (!row) {
      row = element("tr", { tabIndex: 0 });
      row.setAttribute("role", "row");
      row.dataset.key = key(item);
      for (const c of cells) {
        const td = element("td", { className: c.className || "" }, element("span", { className: c.code ? "code" : "" }), ...(c.small ? [element("small")] : []));
        td.setAttribute("role", "cell");
        td.dataset.name = c.name;
        row.append(td);
      }
      const last = element("td", { className: "actions" });
      last.setAttribute("role", "cell");
      for (const a of acts) {
        const button = element("button", { type: "button", textContent: a.name, className: a.className || "" });
        button.dataset.act = a.name;
        button.addEventListener("click", () => a.act(row.dataset.key));
        last.append(button);
      }
      row.append(last);
    }
    cells.forEach((c, n) => {
      const td = row.children[n];
      setText(td.firstChild, c.text(item) || "–");
      if (c.small) setText(td.lastChild, c.small(item));
    });
    acts.forEach((a, n) => {
      const button = row.lastChild.children[n], why = a.not?.(item) || "";
      button.disabled = why !== "";
      button.title = why;
      button.setAttribute("aria-label", a.name + " " + place(item));
    });
    if (body.children[at] !== row) body.insertBefore(row, body.children[at] || null);
  });
  if (lost >= 0 && !document.querySelector("dialog[open]")) {
    (body.children[Math.min(lost, body.children.length - 1)] || body.closest("section").querySelector("h2")).focus({ preventScroll: true });
  }
}

function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

const sessionCells = [
  { name: "Pod", text: (s) => plain(s.pod_name) || "(no pod)", small: (s) => plain(s.pod_namespace) },
  { name: "Container", text: (s) => plain(s.container) },
  { name: "Kind", text: (s) => s.kind + (s.tty ? ", terminal" : ""), small: (s) => plain(s.protocol).replace(".channel.k8s.io", "") },
  { name: "Command", text: commandOf, code: true },
  { name: "Age", text: (s) => age(s.age_seconds), className: "number" },
  { name: "In / out", text: (s) => bytes(s.bytes_in) + " / " + bytes(s.bytes_out), className: "number" },
];
const sessionActs = [
  { name: "Watch", act: (id) => watch(id), not: (s) => s.watchable ? "" : "Only sessions with a terminal, and those that are recorded, can be watched" },
  { name: "End", act: (id) => confirmEnd(id), className: "danger" },
];
const recordingCells = [
  { name: "Pod", text: (r) => plain(r.pod_name), small: (r) => plain(r.pod_namespace) },
  { name: "Container", text: (r) => plain(r.container) },
  { name: "Started", text: (r) => new Date(r.started).toLocaleString(), small: (r) => "session " + plain(r.session_id).slice(0, 8) },
  { name: "Size", text: (r) => bytes(r.size), className: "number" },
];
const recordingActs = [{ name: "Play", act: (name) => play(name) }];

function chosen(item) {
  const namespace = find("namespace").value, pod = find("pod").value.trim().toLowerCase();
  return (!namespace || item.pod_namespace === namespace) && (item.pod_name || "").toLowerCase().includes(pod);
}

function draw() {
  const select = find("namespace"), was = select.value;
  const namespaces = [...new Set([...(state.sessions || []), ...(state.recordings || [])].map((s) => s.pod_namespace).filter(Boolean))].sort();
  if (was && !namespaces.includes(was)) namespaces.push(was);
  if ([...select.options].slice(1).map((o) => o.value).join("\n") !== namespaces.join("\n")) {
    select.replaceChildren(element("option", { value: "", textContent: "all" }), ...namespaces.map((n) => element("option", { value: n, textContent: plain(n) })));
    select.value = was;
  }
  const table = (all, body, count, none, nothing, key, cells, acts) => {
    if (!all) return;
    const some = all.filter(chosen), listed = some.slice(0, most.listed), hidden = some.length - listed.length;
    rows(find(body), listed, key, cells, acts);
    setText(find(count), listed.length === all.length ? String(all.length) : listed.length + " of " + all.length);
    setText(find(none), hidden ? hidden + " more are not listed. Filter to see them." : all.length ? "Nothing matches the filters." : nothing);
    find(none).hidden = listed.length > 0 && !hidden;
  };
  table(state.sessions, "sessions", "count", "none", "Nobody is in a pod of this node.", (s) => s.id, sessionCells, sessionActs);
  table(state.recordings, "recordings", "recording-count", "no-recordings", "No recordings. A [[recording.rule]] in streamshim's configuration begins them.", (r) => r.name, recordingCells, recordingActs);
}

function status(text, className) {
  setText(find("status"), text);
  find("status").className = className;
}

function trouble(title, text) {
  setText(find("problem-title"), title);
  setText(find("problem-text"), text);
  find("problem").hidden = !title;
  find("content").classList.toggle("stale", Boolean(title));
}

async function poll() {
  try {
    const metrics = call("metrics").then((r) => r.text(), () => null);
    state.sessions = (await (await call("sessions")).json()).sessions || [];
    drawFigures(state.sessions, await metrics);
    draw();
    status("live", "good");
    trouble("", "");
  } catch (problem) {
    if (problem.status === 401) {
      status("not signed in", "bad");
      trouble("Not signed in.", problem.message);
      find("content").hidden = true;
      return;
    }
    status("no connection", "bad");
    trouble("No connection to streamshim; trying again.", problem.message);
    if (!state.sessions) setText(find("none"), "Not known.");
  }
  setTimeout(poll, pollInterval);
}

async function pollRecordings() {
  try {
    state.recordings = (await (await call("recordings")).json()).recordings || [];
    draw();
  } catch (problem) {
    if (problem.status === 401) return;
    if (!state.recordings) setText(find("no-recordings"), problem.message);
  }
  setTimeout(pollRecordings, recordingsInterval);
}

// The screen shows a live terminal or a recording.
function openScreen(title) {
  find("screen-title").textContent = title;
  note("");
  find("terminal").replaceChildren();
  find("screen").showModal();
  const stop = (state.watching = new AbortController());
  return stop.signal;
}

function note(text) { setText(find("screen-note"), plain(text)); }

function closeScreen() {
  state.watching?.abort();
  state.player?.dispose();
  state.watching = state.player = null;
  find("terminal").replaceChildren();
}

const within = (n, limit) => Math.min(limit, Math.max(1, Number(n) || 1));

async function watch(id) {
  const session = state.sessions.find((s) => s.id === id);
  if (!session || !session.watchable) return;
  const stop = openScreen("Live: " + place(session));
  // Read-only: it takes no input, its answers are discarded, and its links do not open.
  const terminal = new Terminal({ disableStdin: true, cursorBlink: false, scrollback: 5000, fontSize: 14, screenReaderMode: true, linkHandler: { activate() {} }, theme: { background: "#121314" } });
  const size = (columns, lines) => {
    columns = within(columns, most.columns);
    // As large as fits. If that is too small to read, the box scrolls.
    terminal.options.fontSize = Math.max(smallestFont, Math.min(15, Math.floor((find("terminal").clientWidth - 24) / columns / wide * 2) / 2));
    terminal.resize(columns, within(lines, most.rows));
  };
  const fit = () => size(terminal.cols, terminal.rows);
  terminal.open(find("terminal"));
  // The emulator repeats these commands as often as they ask. A container may ask for 2147483647, which would block the page.
  const tooOften = ([times]) => times > most.repeats;
  for (const final of "ILMSTZ") terminal.parser.registerCsiHandler({ final }, tooOften);
  // This one repeats the character before the cursor, which has one or two cells and any number of combining marks.
  terminal.parser.registerCsiHandler({ final: "b" }, ([times]) => {
    const at = terminal.buffer.active, line = at.getLine(at.baseY + at.cursorY);
    return [1, 2].some((back) => times * (line?.getCell(at.cursorX - back)?.getChars().length || 1) > most.repeats);
  });
  const write = async (data) => {
    for (let from = 0; from < data.length; from += most.piece) {
      await new Promise((written) => terminal.write(data.slice(from, from + most.piece), written));
    }
  };
  window.addEventListener("resize", fit);
  stop.addEventListener("abort", () => { window.removeEventListener("resize", fit); terminal.dispose(); });
  let before = ""; // the name of the watch that this one goes on with
  for (let tries = 0; ; tries++) {
    try {
      const response = await call("sessions/" + encodeURIComponent(id) + "/watch?before=" + encodeURIComponent(before), { signal: stop });
      before = response.headers.get("Streamshim-Watch") || "";
      note("Read-only. What was shown before is not here.");
      tries = 0;
      let header = false;
      for await (const line of lines(response.body)) {
        if (!header) {
          header = true;
          size(line.width, line.height);
          continue;
        }
        const [, code, data] = line;
        if (code === "o") await write(data);
        if (code === "r") size(...data.split("x"));
        if (code === "m") note(data);
      }
    } catch (problem) {
      if (stop.aborted) return;
      if (tries === 0 && problem.status >= 400 && problem.status < 500) return note(problem.message);
    }
    if (stop.aborted) return;
    // The stream ends with the session. It also ends at a hand-over, after which the next streamshim has the session.
    try {
      const live = (await (await call("sessions", { signal: stop })).json()).sessions || [];
      if (!live.some((s) => s.id === id)) return note("The session has ended.");
    } catch { /* the next streamshim does not answer yet */ }
    if (stop.aborted) return;
    if (tries >= reconnects) return note("The connection was lost. Close, and watch again.");
    note("Reconnecting");
    await new Promise((passed) => setTimeout(passed, reconnectPause));
  }
}

// lines yields the lines of an asciicast as they arrive. It ends at an incomplete line.
async function* lines(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    text += value;
    const whole = text.split("\n");
    text = whole.pop();
    for (const line of whole) if (line) yield JSON.parse(line);
  }
}

async function play(name) {
  const recording = state.recordings.find((r) => r.name === name);
  if (!recording) return;
  const stop = openScreen("Recording: " + place(recording));
  note("Loading " + bytes(recording.size));
  try {
    const text = await (await call("recordings/" + encodeURIComponent(name), { signal: stop })).text();
    if (stop.aborted) return;
    const { data, columns } = bounded(text), box = element("div", { className: "player" });
    box.style.minWidth = Math.ceil(columns * wide * smallestFont) + "px"; // as in watch
    find("terminal").append(box);
    state.player = AsciinemaPlayer.create({ data }, box, { autoPlay: true, fit: "both", idleTimeLimit: 2, terminalFontFamily: "ui-monospace, Menlo, Consolas, 'DejaVu Sans Mono', monospace" });
    note("Space plays and pauses, arrows seek, f is full screen. Pauses are cut to 2 s.");
    find("terminal").querySelector(".ap-wrapper")?.focus();
  } catch (problem) {
    if (!stop.aborted) note("It cannot be played: " + problem.message);
  }
}

// bounded returns a recording whose terminals have a size that a browser can draw, without an incomplete last line, and the
// width with which it begins.
function bounded(text) {
  const end = text.indexOf("\n");
  if (end < 0) throw new Error("it is empty");
  const header = JSON.parse(text.slice(0, end));
  header.width = within(header.width, most.columns);
  header.height = within(header.height, most.rows);
  const events = text.slice(end + 1, text.lastIndexOf("\n") + 1)
    .replace(/^(\[[^",]*,\s*"r",\s*")(\d+)x(\d+)/gm, (_, start, columns, rows) => start + within(columns, most.columns) + "x" + within(rows, most.rows));
  return { data: JSON.stringify(header) + "\n" + events, columns: header.width };
}

// Ending a session asks for confirmation first.
function confirmEnd(id) {
  const s = state.sessions.find((one) => one.id === id);
  if (!s) return;
  state.ending = id;
  const facts = [["Pod", place(s)], ["Kind", s.kind + (s.tty ? ", terminal" : "")], ["Command", commandOf(s) || "–"], ["Age", age(s.age_seconds)]];
  find("confirm-facts").replaceChildren(...facts.flatMap(([name, text]) => [element("dt", { textContent: name }), element("dd", { textContent: text })]));
  setText(find("confirm-problem"), "");
  find("confirm-yes").disabled = false;
  find("confirm").showModal();
}

async function end() {
  find("confirm-yes").disabled = true;
  try {
    await call("sessions/" + encodeURIComponent(state.ending) + "/end", { method: "POST" });
  } catch (problem) {
    if (problem.status !== 404) { // 404: it has ended already
      setText(find("confirm-problem"), problem.message);
      find("confirm-yes").disabled = false;
      return;
    }
  }
  find("confirm").close();
}

function move(step) {
  const all = [...document.querySelectorAll("tbody tr")];
  const at = all.indexOf(document.activeElement?.closest?.("tr"));
  all[at < 0 ? (step > 0 ? 0 : all.length - 1) : Math.min(all.length - 1, Math.max(0, at + step))]?.focus();
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || document.querySelector("dialog[open]")) return;
  if (event.target.matches("input, select")) {
    if (event.key === "Escape") event.target.blur();
    return;
  }
  const row = event.target.closest?.("tr");
  const act = (name) => row?.querySelector('[data-act="' + name + '"]:not(:disabled)')?.click();
  switch (event.key) {
    case "/": find("pod").focus(); break;
    case "j": case "ArrowDown": move(1); break;
    case "k": case "ArrowUp": move(-1); break;
    case "Enter": if (event.target !== row) return; act("Watch"); act("Play"); break;
    case "x": act("End"); break;
    default: return;
  }
  event.preventDefault();
});
find("screen-close").addEventListener("click", () => find("screen").close());
find("screen").addEventListener("close", closeScreen);
// In the capture phase, before the player, which uses Esc itself.
find("screen").addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || document.fullscreenElement) return;
  event.preventDefault();
  event.stopPropagation();
  find("screen").close();
}, true);
find("confirm-no").addEventListener("click", () => find("confirm").close());
find("confirm-yes").addEventListener("click", end);
find("namespace").addEventListener("change", draw);
find("pod").addEventListener("input", draw);
// An address with another token was opened in the tab with the page.
window.addEventListener("hashchange", () => { if (token()) location.reload(); });
makeFigures();
signIn().then(() => { poll(); pollRecordings(); });
