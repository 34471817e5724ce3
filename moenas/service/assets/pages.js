// The script of all pages: what it shows comes from the API of this server alone.
const page = document.body.dataset;
const message = document.getElementById("message");

async function api(method, path, body) {
  const options = { method, headers: { Accept: "application/json" } };
  if (body !== undefined) {
    options.headers["Content-Type"] = "application/json";
    options.body = JSON.stringify(body);
  }
  const response = await fetch(path, options);
  const found = await response.json();
  if (!response.ok) throw Object.assign(new Error(found.detail), { problem: found });
  return found;
}

function element(tag, text, attributes = {}) {
  const made = document.createElement(tag);
  made.textContent = text;
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

function say(text) { message.textContent = text; }

// Numbers have the form of the commands: 1.23M from 10,000 on, else four digits.
function short(value) {
  if (typeof value !== "number") return String(value ?? "");
  for (const [size, unit] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]]) {
    if (Math.abs(value) >= Math.max(size, 1e4)) return Number((value / size).toPrecision(3)) + unit;
  }
  return Number(value.toPrecision(4)).toString();
}

function duration(seconds) {
  const whole = Math.max(1, Math.round(seconds));
  if (whole < 60) return `${whole} s`;
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${whole % 60} s`;
  return `${Math.floor(whole / 3600)} h ${Math.floor((whole % 3600) / 60)} min`;
}

// A touch screen has no hover, so the buttons of a plot would always cover its title.
const narrow = () => window.innerWidth < 700;
const plotting = () => ({ responsive: true, displaylogo: false, displayModeBar: narrow() ? false : "hover" });

// --- the list ---------------------------------------------------------------------------------

function watchStudies() {
  setInterval(async () => {
    const found = await api("GET", "/v1/studies?limit=500" + filters());
    const rows = new Map([...document.querySelectorAll("#studies tr[data-study]")]
      .map((row) => [row.dataset.study, row]));
    for (const study of found.studies) {
      const row = rows.get(study.name);
      if (!row) { location.reload(); return; }
      const state = row.querySelector(".state");
      state.textContent = study.state;
      state.className = `state ${study.state}`;
      row.cells[2].textContent = study.trials;
      row.cells[3].textContent = study.evaluations;
    }
  }, 5000);
}

function filters() {
  const asked = new URLSearchParams(location.search);
  return ["contains", "state"].filter((key) => asked.get(key))
    .map((key) => `&${key}=${encodeURIComponent(asked.get(key))}`).join("");
}

// --- the form ---------------------------------------------------------------------------------

function submission() {
  const value = (id) => document.getElementById(id).value;
  const found = { space: value("space"), overrides: value("overrides").split("\n")
    .map((line) => line.trim()).filter(Boolean) };
  return found;
}

function range(found) {
  return typeof found === "number" ? short(found) : `${short(found.min)} to ${short(found.max)}`;
}

function showCheck(found) {
  const box = document.getElementById("check");
  const rows = [
    ["Points", found.points], ["Objectives", found.objectives.join(", ")],
    ["Feasible draws", `${found.feasible} of ${found.drawn}`],
    ["Parameters", range(found.params)], ["Active parameters", range(found.active_params)],
    ["FLOPs per token", range(found.flops_per_token)],
    ["Training FLOPs", found.estimate.train_flops.toPrecision(3)],
    ["Duration", found.estimate.hours === null ? `unknown: ${found.estimate.basis}`
      : `${duration(3600 * found.estimate.hours)} with ${found.estimate.workers} workers`],
  ];
  const table = element("table", "");
  for (const [name, value] of rows) {
    const row = table.insertRow();
    row.append(element("th", name, { scope: "row" }), element("td", String(value)));
  }
  box.replaceChildren(element("p", `${found.name} is valid.`), table,
    ...[found.binding, ...found.notes].filter(Boolean).map((note) => element("p", note)));
}

function showProblem(problem) {
  const box = document.getElementById("check");
  const lines = (problem.errors ?? [{ message: problem.detail }]).map((error) => {
    const place = error.line ? `line ${error.line}, column ${error.column}: ` : "";
    return element("p", `${place}${error.path ? error.path + ": " : ""}${error.message}`,
      { class: "error" });
  });
  box.replaceChildren(...lines);
}

function liveCheck() {
  const send = document.getElementById("send");
  let timer, number = 0;
  const check = async () => {
    const mine = ++number;
    try {
      const found = await api("POST", "/v1/spaces/check", { ...submission(), draws: 50 });
      if (mine === number) { showCheck(found); send.disabled = false; }
    } catch (error) {
      if (mine === number) showProblem(error.problem ?? { detail: error.message });
    }
  };
  const later = () => { send.disabled = true; clearTimeout(timer); timer = setTimeout(check, 400); };
  for (const id of ["space", "overrides"]) document.getElementById(id).addEventListener("input", later);
  document.getElementById("submission").addEventListener("submit", async (event) => {
    event.preventDefault();
    const trials = document.getElementById("trials").valueAsNumber;
    const body = { ...submission(), priority: document.getElementById("priority").valueAsNumber || 0 };
    if (trials) body.trials = trials;
    try {
      const found = await api("POST", "/v1/studies", body);
      location.href = `/studies/${encodeURIComponent(found.name)}`;
    } catch (error) { showProblem(error.problem ?? { detail: error.message }); }
  });
  check();
}

// --- a study ----------------------------------------------------------------------------------

const study = () => `/v1/studies/${encodeURIComponent(page.study)}`;
const trialPage = (trial) => `/studies/${encodeURIComponent(page.study)}/trials/${trial}`;
const axis = (title) => ({ title: { text: title }, automargin: true });

async function drawFront() {
  const [front, trials] = await Promise.all([
    api("GET", `${study()}/front`), api("GET", `${study()}/trials?limit=1000`)]);
  const names = Object.keys(front.directions);
  if (!names.length) return;
  const [y, x] = names.length > 1 ? [names[0], names[names.length - 1]] : [names[0], names[0]];
  const rest = trials.trials.filter((t) => t.status === "complete" && !t.on_front);
  const traces = [
    { name: "dominated", x: rest.map((t) => t.values[x]), y: rest.map((t) => t.values[y]),
      customdata: rest.map((t) => t.trial), text: rest.map((t) => `trial ${t.trial}`),
      mode: "markers", marker: { color: "#9AA0A6", size: 7 }, hoverinfo: "text" },
    { name: "front", x: front.members.map((m) => m.values[x]), y: front.members.map((m) => m.values[y]),
      customdata: front.members.map((m) => m.trial),
      text: front.members.map((m) => `trial ${m.trial}<br>${m.summary}`),
      mode: "markers", marker: { color: "#0072B2", size: 11 }, hoverinfo: "text" },
  ];
  const plot = document.getElementById("front-plot");
  await Plotly.react(plot, traces, { xaxis: axis(x), yaxis: axis(y), margin: { t: 20 },
    legend: { orientation: "h", y: 1.12 }, hovermode: "closest" }, plotting());
  plot.removeAllListeners("plotly_click");
  plot.on("plotly_click", (event) => { location.href = trialPage(event.points[0].customdata); });
  fillFront(front, names);
}

function fillFront(front, names) {
  const checked = new Set([...document.querySelectorAll("#front input:checked")].map((i) => i.value));
  const seeds = new Map((front.seeds?.members ?? []).map((each) => [each.trial, each]));
  const head = document.querySelector("#front thead tr");
  if (seeds.size && !head.querySelector(".seeds")) {
    for (const text of ["Seeds", "P(front)"]) {
      head.insertBefore(element("th", text, { class: "seeds" }), head.cells[head.cells.length - 2]);
    }
  }
  const rows = front.members.map((member) => {
    const row = element("tr", "");
    const box = element("input", "", { type: "checkbox", name: "trial", value: member.trial,
      "aria-label": `Compare trial ${member.trial}` });
    box.checked = checked.has(String(member.trial));
    const cells = [box, element("a", member.trial, { href: trialPage(member.trial) }),
      ...names.map((name) => withInterval(front, seeds.get(member.trial), member, name)),
      ...seedCells(seeds, member), short(member.params), member.summary];
    for (const cell of cells) row.insertCell().append(cell);
    return row;
  });
  if (rows.length) document.querySelector("#front tbody").replaceChildren(...rows);
  allowCompare();
}

function withInterval(front, own, member, name) {
  if (!own || !front.seeds.noisy.includes(name)) return short(member.values[name]);
  return `${short(own.values[name].mean)} +- ${short(own.values[name].half_width)}`;
}

function seedCells(seeds, member) {
  if (!seeds.size) return [];
  const own = seeds.get(member.trial);
  return [own?.seeds ?? 1, own?.probability?.toFixed(2) ?? "-"];
}

function allowCompare() {
  const count = document.querySelectorAll("#front input:checked").length;
  document.getElementById("compare").disabled = count !== 2;
}

async function drawFigures() {
  const found = await api("GET", `${study()}/figures`);
  const box = document.getElementById("figures");
  for (const [name, figure] of Object.entries(found.figures)) {
    if (name === "front") continue;
    let place = document.getElementById(`figure-${name}`);
    if (!place) {
      place = element("div", "", { id: `figure-${name}`, class: "plot" });
      box.append(place);
    }
    if (narrow()) figure.layout.legend = { orientation: "h", y: -0.2, yanchor: "top" };
    await Plotly.react(place, figure.data, figure.layout, plotting());
  }
}

function fillFailures(trials) {
  const rows = trials.filter((t) => t.failure).map((t) => {
    const row = element("tr", "");
    const cells = [element("a", t.trial, { href: trialPage(t.trial) }), t.failure, t.message];
    for (const cell of cells) row.insertCell().append(cell);
    return row;
  });
  if (rows.length) document.querySelector("#failures tbody").replaceChildren(...rows);
}

async function refreshStudy() {
  const found = await api("GET", study());
  const state = document.getElementById("state");
  state.textContent = found.state;
  state.className = `state ${found.state}`;
  document.getElementById("evaluated").textContent = found.progress.evaluated;
  document.getElementById("trials").textContent = found.trials;
  showActions(found.actions);
  await drawFront();
  fillFailures((await api("GET", `${study()}/trials?limit=1000`)).trials);
  await drawFigures();
}

function showActions(actions) {
  for (const button of document.querySelectorAll("#actions [data-action]")) {
    button.disabled = !actions.includes(button.dataset.action);
  }
}

function followStudy() {
  // At most one refresh waits, and the next one begins 2 s after the end of the last one.
  let waiting = false, earliest = 0;
  const soon = () => {
    if (waiting) return;
    waiting = true;
    setTimeout(() => {
      waiting = false;
      refreshStudy().catch(report).finally(() => { earliest = Date.now() + 2000; });
    }, Math.max(300, earliest - Date.now()));
  };
  const source = new EventSource(`${study()}/events?after=${page.lastEvent}`);
  for (const kind of ["started", "study_created", "trial_finished", "trials_remeasured", "study_ended",
    "paused", "resumed", "extended", "restarted", "requeued", "driver_ended", "finished", "failed",
    "cancelled"]) source.addEventListener(kind, soon);
  source.addEventListener("deleted", () => { source.close(); location.href = "/"; });
  document.getElementById("front").addEventListener("change", allowCompare);
  document.getElementById("actions")?.addEventListener("click", (event) => {
    const action = event.target.dataset.action;
    if (action) act(action).then(soon, report);
  });
  refreshStudy().catch(report);
}

function report(error) { say(error.message); }

async function act(action) {
  if (action === "delete") return remove();
  const body = action === "extend"
    ? { trials: document.getElementById("total").valueAsNumber } : undefined;
  const found = await api("POST", `${study()}/${action}`, body);
  say(`The study is ${found.state}.`);
}

async function remove() {
  try {
    await api("DELETE", study());
  } catch (error) {
    const confirmation = error.problem?.confirmation;
    if (!confirmation) throw error;
    if (confirm(`Delete ${page.study} with all its trials and weights?`)) {
      await api("DELETE", `${study()}?confirm=${confirmation}`);
    }
  }
}

// --- a trial ----------------------------------------------------------------------------------

async function drawCurve() {
  const found = await api("GET", `${study()}/trials/${page.trial}`);
  const points = found.curve.filter((p) => typeof p.train_loss === "number");
  const trace = { x: points.map((p) => p.tokens), y: points.map((p) => p.train_loss), mode: "lines",
    name: "training loss" };
  await Plotly.newPlot("curve-plot", [trace], { xaxis: axis("tokens"),
    yaxis: axis("training loss (nats/token)"), margin: { t: 20 } },
  plotting());
}

const start = { studies: watchStudies, submit: liveCheck, study: followStudy, trial: drawCurve };
start[page.page]?.();
