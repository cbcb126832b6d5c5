"use strict";
// The console. Whatever an agent sent is written with textContent, never as markup.

const LOG_ROWS = 300;
const COMMAND_ROWS = 20;

// What each button asks for; the bounds above the buttons are added.
const FAULTS = [
  ["Connections", [
    ["Drop all now", { kind: "drop" }],
    ["Refuse new ones", { kind: "refuse" }],
    ["Never answer", { kind: "hang" }],
    ["Black hole", { kind: "blackhole" }],
    ["Black hole, agent to backend", { kind: "blackhole", direction: "in" }],
    ["Black hole, backend to agent", { kind: "blackhole", direction: "out" }],
    ["Drop after 3 messages", { kind: "drop", after: 3 }],
    ["Answer 2 s late", { kind: "slow", delay: 2 }],
  ]],
  ["Answers", [
    ["503, Retry-After 10 s", { kind: "status", status: 503, retry_after: 10 }],
    ["429, Retry-After 10 s", { kind: "status", status: 429, retry_after: 10 }],
    ["500", { kind: "status", status: 500 }],
    ["401", { kind: "status", status: 401 }],
    ["HTML with 200", { kind: "html" }],
    ["Crash before storing", { kind: "crash" }],
    ["Crash after storing", { kind: "crash", stored: true }],
  ]],
  ["WebSocket", [
    ["Close with 1012", { kind: "close", code: 1012 }],
    ["Close with 1008", { kind: "close", code: 1008 }],
    ["No registration answer", { kind: "silent" }],
    ["No acks", { kind: "no_ack" }],
    ["Nack, again in 5 s", { kind: "nack", retry_after: 5 }],
    ["Nack for good", { kind: "nack" }],
  ]],
  ["Send to agents", [
    ["Garbage", { kind: "malformed", form: "garbage" }],
    ["Binary", { kind: "malformed", form: "binary" }],
    ["Oversized", { kind: "malformed", form: "oversized" }],
    ["Deep", { kind: "malformed", form: "deep" }],
    ["Unknown type", { kind: "malformed", form: "unknown" }],
    ["Not UTF-8", { kind: "malformed", form: "utf8" }],
    ["Reserved bits", { kind: "malformed", form: "bits" }],
  ]],
];

const $ = (id) => document.getElementById(id);
const faultButtons = [];
const commands = new Map(); // id -> its list item and what is known
let skew = 0; // the backend's clock minus this one, in seconds
let state = null;
let paused = false;

function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

function pill(text, look = "") {
  return element("span", { className: `pill ${look}`, textContent: text });
}

function ago(at) {
  if (!at) return "never";
  const seconds = Math.max(0, Date.now() / 1000 + skew - at);
  if (seconds < 1.5) return "now";
  if (seconds < 90) return `${Math.round(seconds)} s ago`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min ago`;
  return `${Math.round(seconds / 3600)} h ago`;
}

async function ask(method, path, body) {
  const options = { method, headers: {} };
  if (body !== undefined) {
    options.headers["Content-Type"] = "application/json";
    options.body = JSON.stringify(body);
  }
  const answer = await fetch(path, options);
  const content = await answer.json();
  if (!answer.ok) throw new Error(content.error || `HTTP ${answer.status}`);
  return content;
}

function complain(id, error) {
  $(id).textContent = error ? error.message : "";
  $(id).hidden = !error;
}

// -- agents ----------------------------------------------------------------------------------------------------------

function meter(name, value) {
  const percent = Number.isFinite(value) ? Math.min(100, Math.max(0, value)) : 0;
  const look = percent >= 90 ? "bad" : percent >= 75 ? "warn" : "";
  // A style attribute would need a wider Content-Security-Policy; a drawing does not.
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "0 0 100 10");
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("aria-hidden", "true");
  const bar = document.createElementNS("http://www.w3.org/2000/svg", "rect");
  bar.setAttribute("width", String(percent));
  bar.setAttribute("height", "10");
  svg.append(bar);
  const box = element("span");
  box.append(svg);
  return element("div", { className: `meter ${look}` }, `${name} ${Math.round(percent)}%`, box);
}

function healthCell(heartbeat) {
  const health = heartbeat.system_health;
  if (!health || typeof health !== "object") return element("span", { className: "quiet", textContent: "–" });
  return element("div", { className: "meters" },
    meter("CPU", health.cpu_usage_percent), meter("mem", health.memory_usage_percent),
    meter("disk", health.disk_usage_percent));
}

function lost(receipts) {
  const counts = new Map(); // kind and reason -> how many
  let total = 0;
  for (const { report } of receipts) {
    for (const { reason, kind, count } of report.losses) {
      total += count;
      counts.set(`${kind} ${reason}`, (counts.get(`${kind} ${reason}`) || 0) + count);
    }
  }
  if (!total) return [];
  const title = Array.from(counts, ([what, count]) => `${count} ${what}`).join("\n");
  return [element("br"), element("small", { className: "lost", textContent: `${total} lost`, title })];
}

function agentRow(agent) {
  const heartbeat = agent.heartbeat || {};
  const name = element("td", { title: agent.machine_id }, element("strong", { textContent: agent.machine_id }));
  const more = [heartbeat.hostname, heartbeat.agent_version && `v${heartbeat.agent_version}`].filter(Boolean).join(" · ");
  if (more) name.append(element("br"), element("small", { className: "quiet", textContent: more }));
  const queued = heartbeat.delivery && Number.isFinite(heartbeat.delivery.queued_events) ? heartbeat.delivery.queued_events : null;
  const waiting = element("td", {}, `${agent.kept_commands} for it`);
  if (queued !== null) waiting.append(element("br"), element("small", { className: "quiet", textContent: `${queued} at the agent` }));
  waiting.append(...lost(agent.loss_receipts));
  const connection = element("td", {},
    agent.connected ? pill("connected", "good") : pill(agent.dialect ? "no WebSocket" : "HTTP only", "off"),
    element("br"), element("small", { className: "quiet", textContent: agent.dialect || "dialect unknown" }));
  const beat = element("td", {}, element("span", { className: "age", textContent: ago(agent.heartbeat_at) }));
  beat.firstChild.dataset.at = agent.heartbeat_at;
  const inventory = element("td", {}, element("span", { className: "age", textContent: ago(agent.inventory_at) }));
  inventory.firstChild.dataset.at = agent.inventory_at;
  if (agent.checksum) inventory.append(element("br"), element("small", { className: "quiet mono", textContent: agent.checksum.slice(0, 8), title: agent.checksum }));
  return element("tr", {}, name, connection, beat, element("td", {}, healthCell(heartbeat)), waiting, inventory);
}

function showState() {
  $("addresses").textContent = "";
  $("addresses").append("HTTP ", element("code", { textContent: state.url }), " · WebSocket ",
    element("code", { textContent: state.websocket_url }), ` · ${state.dialects.join(" and ")}`,
    state.token_required ? " · token required" : " · no token", state.quirks ? " · with quirks" : "",
    state.durable ? "" : " · in memory only");
  $("agents").replaceChildren(...state.agents.map(agentRow));
  $("no-agents").hidden = state.agents.length > 0;
  const known = [...$("machine").options].map((option) => option.value);
  const names = state.agents.map((agent) => agent.machine_id);
  if (known.join("\n") !== names.join("\n")) {
    const chosen = $("machine").value;
    $("machine").replaceChildren(...names.map((name) => new Option(name, name)));
    if (names.includes(chosen)) $("machine").value = chosen;
  }
  showFaults();
}

async function look() {
  try {
    state = await ask("GET", "api/state");
    skew = state.now - Date.now() / 1000;
    showState();
  } catch { /* the pill in the corner says that the backend is away */ }
}

let wanted = false;
function refresh() {
  // Many events in a row ask for one look only.
  if (wanted) return;
  wanted = true;
  setTimeout(() => { wanted = false; look(); }, 100);
}

// -- faults ----------------------------------------------------------------------------------------------------------

function matches(wish, fault) {
  return Object.entries(wish).every(([key, value]) => fault[key] === value)
    && (wish.stored !== undefined || !fault.stored) && (wish.direction !== undefined || fault.direction === "both")
    && (wish.retry_after !== undefined || fault.retry_after === null);
}

function showFaults() {
  $("banner").hidden = state.faults.length === 0;
  $("active-faults").replaceChildren(...state.faults.map(({ fault, description, left, seconds_left }) => {
    const bounds = [];
    if (fault.transport !== "both") bounds.push(fault.transport === "http" ? "HTTP only" : "WebSocket only");
    if (fault.kind === "status") bounds.push(String(fault.status));
    if (fault.kind === "malformed") bounds.push(fault.form);
    if (left !== null) bounds.push(left === 1 ? "once more" : `${left} more times`);
    if (seconds_left !== null) bounds.push(`for ${Math.ceil(seconds_left)} s`);
    return element("li", {}, element("code", { textContent: fault.kind }), ` – ${description}`,
      bounds.length ? ` (${bounds.join(", ")})` : "");
  }));
  for (const [button, wish] of faultButtons) {
    button.setAttribute("aria-pressed", String(state.faults.some(({ fault }) => matches(wish, fault))));
  }
}

async function misbehave(wish) {
  const fault = { ...wish, transport: $("transport").value };
  const oneOff = (wish.kind === "drop" || wish.kind === "close") && wish.after === undefined;
  if (!oneOff && $("seconds").value) fault.seconds = Number($("seconds").value);
  if (!oneOff && $("count").value && wish.kind !== "blackhole") fault.count = Number($("count").value);
  try {
    await ask("POST", "api/faults", fault);
    complain("fault-error", null);
  } catch (error) {
    complain("fault-error", error);
  }
  refresh();
}

for (const [title, buttons] of FAULTS) {
  $("fault-buttons").append(element("h3", { textContent: title }));
  for (const [label, wish] of buttons) {
    const button = element("button", { type: "button", textContent: label });
    button.setAttribute("aria-pressed", "false");
    button.addEventListener("click", async () => {
      if (button.getAttribute("aria-pressed") === "true") {
        await ask("DELETE", `api/faults/${wish.kind}`);
        refresh();
      } else {
        misbehave(wish);
      }
    });
    faultButtons.push([button, wish]);
    $("fault-buttons").append(button);
  }
}
const away = element("button", { type: "button", textContent: "Goaway, back within 10 s" });
away.addEventListener("click", () => ask("POST", "api/goaway", { reconnect_after: 1, window: 9 })
  .then(({ agents }) => complain("fault-error", agents ? null : new Error("no commsmgr.v1 agent is connected")))
  .catch((error) => complain("fault-error", error)));
$("fault-buttons").append(away);
$("behave").addEventListener("click", async () => { await ask("DELETE", "api/faults"); refresh(); });
$("bounds").addEventListener("submit", (event) => event.preventDefault());

// -- commands --------------------------------------------------------------------------------------------------------

function addCommand(id, machine, label) {
  const status = pill("sent");
  const item = element("li", {},
    element("div", { className: "line" },
      element("span", {}, element("strong", { textContent: label }), ` → ${machine}`), status));
  commands.set(id, { item, status });
  $("commands").prepend(item);
  while ($("commands").childElementCount > COMMAND_ROWS) $("commands").lastElementChild.remove();
}

function setStatus(id, text, look) {
  const known = commands.get(id);
  if (!known || (known.done && look === "")) return; // an ack that is heard of late changes nothing
  known.status.textContent = text;
  known.status.className = `pill ${look}`;
}

function followCommand(event) {
  if (event.kind === "command" && event.transport === "") setStatus(event.id, "kept", "warn");
  if (event.kind === "acked") setStatus(event.id, "taken", "");
  if (event.kind === "nacked") setStatus(event.id, "refused", "bad");
  if (event.kind !== "result") return;
  const { command_id, status, output, error } = event.detail;
  const milliseconds = event.detail.execution_time_ms || event.detail.execution_time || 0;
  const known = commands.get(command_id);
  if (!known || known.done) return;
  known.done = true;
  setStatus(command_id, `${status} · ${milliseconds} ms`, status === "success" ? "good" : "bad");
  const text = [output, error].filter(Boolean).join("\n");
  if (text) known.item.append(element("pre", { textContent: text }));
}

$("type").addEventListener("change", () => { $("other-label").hidden = $("type").value !== ""; });
$("command-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const order = {
    machine_id: $("machine").value, type: $("type").value || $("other").value.trim(), command: $("command").value,
    args: $("args").value.split("\n").filter((line) => line !== ""), timeout: Number($("timeout").value) || 0,
  };
  try {
    const { id } = await ask("POST", "api/commands", order);
    complain("command-error", null);
    if (!commands.has(id)) addCommand(id, order.machine_id, order.type);
    // The answer to this request and the events race: look once at what came first.
    const now = await ask("GET", `api/commands/${encodeURIComponent(id)}`);
    if (now.result) {
      followCommand({ kind: "result", detail: { ...now.result, command_id: id } });
    } else if (now.state === "pending") {
      const agent = state.agents.find(({ machine_id }) => machine_id === order.machine_id);
      if (agent && !agent.connected) setStatus(id, "kept", "warn");
    } else if (now.state === "taken") {
      setStatus(id, "taken", "");
    }
  } catch (error) {
    complain("command-error", error);
  }
});

// -- what happens ----------------------------------------------------------------------------------------------------

const LOOKS = {
  registered: "good", result: "good", acked: "good", disconnected: "warn", refused: "bad", nacked: "bad", fault: "bad",
  behaving: "good", duplicate: "warn", losses: "warn", heartbeat: "off", inventory: "off",
};

function details(event) {
  const parts = [event.note];
  const { detail } = event;
  if (detail.type) parts[0] = `${event.note}: ${[detail.command, ...(detail.args || [])].filter(Boolean).join(" ")}`.replace(/: $/, "");
  if (detail.output) parts.push(detail.output.slice(0, 200));
  if (detail.error) parts.push(detail.error.slice(0, 200));
  return parts.filter(Boolean).join(" – ");
}

function logRow(event) {
  const time = new Date(event.at * 1000);
  const stamp = `${time.toLocaleTimeString("en-GB")}.${String(time.getMilliseconds()).padStart(3, "0")}`;
  const row = element("tr", {},
    element("td", { textContent: stamp }), element("td", {}, pill(event.kind, LOOKS[event.kind] || "")),
    element("td", { textContent: event.machine_id, title: event.machine_id }),
    element("td", { textContent: { http: "HTTP", websocket: "WS" }[event.transport] || "" }),
    element("td", { textContent: details(event), title: event.id }));
  row.dataset.kind = event.kind;
  row.hidden = event.kind === "heartbeat" && !$("show-heartbeats").checked;
  return row;
}

look();
const stream = new EventSource("api/stream");
stream.onopen = () => { $("stream").textContent = "live"; $("stream").className = "pill good"; refresh(); };
stream.onerror = () => { $("stream").textContent = "backend is away"; $("stream").className = "pill bad"; };
stream.onmessage = ({ data }) => {
  const event = JSON.parse(data);
  followCommand(event);
  if (!paused) {
    $("log").prepend(logRow(event));
    while ($("log").childElementCount > LOG_ROWS) $("log").lastElementChild.remove();
  }
  refresh();
};
$("pause").addEventListener("click", () => {
  paused = !paused;
  $("pause").setAttribute("aria-pressed", String(paused));
});
$("clear").addEventListener("click", () => $("log").replaceChildren());
$("show-heartbeats").addEventListener("change", () => {
  for (const row of $("log").children) row.hidden = row.dataset.kind === "heartbeat" && !$("show-heartbeats").checked;
});
setInterval(() => {
  for (const span of document.querySelectorAll(".age")) span.textContent = ago(Number(span.dataset.at));
  if (state && state.faults.some(({ seconds_left }) => seconds_left !== null)) refresh();
}, 1000);
