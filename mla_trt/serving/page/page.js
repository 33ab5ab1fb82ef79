const POLL_MS = 500;
const HISTORY = 120; // polls: a minute
const RATE_POLLS = 4;
const MOST_STREAMS = 4; // browsers open six connections to a server, and the figures need one
const TELL_MS = 100;
const KEPT_STREAMS = 20;
const KEPT_SAMPLES = 2000;
const SHOWN_SAMPLES = 200;
const SVG = "http://www.w3.org/2000/svg";
const FINISHES = { stop: "stopped at a stop id", length: "complete", deadline: "out of time" };

const at = (id) => document.getElementById(id);
const running = new Set();
const firsts = [];
const betweens = [];
let about = null;

async function begin() {
  const answer = await fetch("/api/model");
  if (!answer.ok) throw new Error("the server does not answer");
  about = await answer.json();
  document.title = `${about.name} · mla-trt`;
  at("name").textContent = about.name;
  show("engine", about.engine);
  show("grpc", `gRPC ${about.grpc}`);
  at("max_new_tokens").value = about.max_new_tokens;
  at("stop_ids").placeholder = about.stop_ids.join(", ") || "none";
  at("prompt-label").textContent = about.text ? "Prompt" : `Prompt: token ids${about.vocabulary ? `, 0 to ${about.vocabulary - 1}` : ""}`;
  at("prompt").placeholder = about.text ? "Once upon a time" : "1, 5, 9";
  at("prompt").focus();
}

function show(id, text) {
  at(id).textContent = text;
  at(id).hidden = false;
}

// Requests

function ids(text, what) {
  const parts = text.split(/[\s,]+/).filter(Boolean);
  if (!parts.every((part) => /^\d+$/.test(part))) throw new Error(`${what} must be whole numbers with commas between, such as 1, 5, 9`);
  return parts.map(Number);
}

function asked() {
  const body = {};
  if (about.text) body.text = at("prompt").value;
  else body.input_ids = ids(at("prompt").value, "token ids");
  if (!(about.text ? body.text : body.input_ids.length)) throw new Error("the prompt is empty");
  for (const name of ["max_new_tokens", "temperature", "top_k", "top_p", "seed"]) {
    if (at(name).value !== "") body[name] = Number(at(name).value);
  }
  if (at("stop_ids").value.trim()) body.stop_ids = ids(at("stop_ids").value, "stop ids");
  return body;
}

function start(event) {
  event.preventDefault();
  at("form-error").hidden = true;
  try {
    if (!about) throw new Error("the server does not answer");
    if (running.size >= MOST_STREAMS) throw new Error(`${MOST_STREAMS} streams run already`);
    new Stream(asked()).run();
  } catch (error) {
    show("form-error", error.message);
  }
}

class Stream {
  constructor(body) {
    this.body = body;
    this.abort = new AbortController();
    this.tokens = 0;
    this.unseen = "";
    this.told = 0;
    this.element = make("article", "card stream running");
    const head = make("header");
    this.status = make("span", "status", "waiting");
    this.figures = make("span", "figures");
    this.button = make("button", "small", "Stop");
    this.button.type = "button";
    this.button.addEventListener("click", () => this.stop());
    head.append(this.status, this.figures, this.button);
    this.said = make("p", about.text ? "said" : "said ids");
    this.said.append(make("span", "asked", about.text ? body.text : body.input_ids.join(" ") + " "));
    this.answer = document.createTextNode("");
    this.said.append(this.answer);
    this.element.append(head, this.said);
  }

  async run() {
    at("empty").hidden = true;
    at("streams").prepend(this.element);
    while (at("streams").querySelectorAll(".stream").length > KEPT_STREAMS) {
      const last = [...at("streams").querySelectorAll(".stream:not(.running)")].at(-1);
      if (!last) break;
      last.remove();
    }
    running.add(this);
    buttons();
    try {
      const finish = await this.read();
      this.end("done", FINISHES[finish] ?? finish);
    } catch (error) {
      if (this.abort.signal.aborted) this.end("done", "stopped by you");
      else this.end("failed", error.message);
    }
  }

  async read() {
    const answer = await fetch("/api/generate", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(this.body),
      signal: this.abort.signal,
    });
    if (!answer.ok) throw new Error((await answer.json()).error);
    const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { done, value } = await reader.read();
      if (done) throw new Error("the connection was lost");
      const lines = (rest + value).split("\n\n");
      rest = lines.pop();
      for (const line of lines) {
        const event = JSON.parse(line.slice("data:".length));
        if (event.error) throw new Error(event.error);
        if (event.token_ids) this.take(event);
        if (event.finish_reason) return event.finish_reason;
      }
    }
  }

  take(event) {
    const now = performance.now();
    const count = event.token_ids.length;
    if (!count) return;
    if (!this.tokens) {
      this.first = event.ms;
      keep(firsts, this.first);
      this.status.textContent = "running";
    } else {
      // Tokens that come together were made one after the other.
      for (let token = 0; token < count; token++) keep(betweens, (event.ms - this.latest) / count);
    }
    this.latest = event.ms;
    this.tokens += count;
    this.unseen += about.text ? event.text : event.token_ids.map((id) => `${id} `).join("");
    // Each change makes the browser lay out all of the text: tokens can come faster than that.
    this.timer ??= setTimeout(() => this.tell(), Math.max(0, this.told + TELL_MS - now));
  }

  tell() {
    clearTimeout(this.timer);
    this.timer = undefined;
    this.told = performance.now();
    this.answer.appendData(this.unseen);
    this.unseen = "";
    this.said.scrollTop = this.said.scrollHeight;
    const decoding = (this.latest - this.first) / 1000;
    const speed = this.tokens > 1 && decoding > 0 ? ` · ${short((this.tokens - 1) / decoding)} tokens/s` : "";
    this.figures.textContent = `${this.tokens} token${this.tokens === 1 ? "" : "s"}${speed} · first after ${time(this.first)}`;
  }

  stop() {
    this.abort.abort();
  }

  end(kind, text) {
    running.delete(this);
    if (this.tokens) this.tell();
    this.element.classList.replace("running", kind);
    this.status.textContent = text;
    this.button.remove();
    buttons();
  }
}

function buttons() {
  at("start").disabled = running.size >= MOST_STREAMS;
  at("stop").disabled = running.size === 0;
  at("stop").textContent = running.size > 1 ? `Stop all ${running.size}` : "Stop";
}

// Figures

const history = [];

async function poll() {
  try {
    const answer = await fetch("/api/metrics");
    const values = await answer.json();
    if (!answer.ok) throw new Error(values.error);
    history.push({ ...values, now: performance.now() });
    if (history.length > HISTORY) history.shift();
    figures();
    state("live", "live");
  } catch (error) {
    state("lost", error instanceof TypeError ? "the server has ended" : error.message);
  }
  setTimeout(poll, POLL_MS);
}

function state(kind, text) {
  at("state").className = `state ${kind}`;
  at("state").textContent = text;
}

function figures() {
  const latest = history.at(-1);
  // Of a loop that is idle, the last step is long ago.
  const batch = (entry) => (entry.running ? entry.batch : 0);
  const used = (entry) => entry.pages_in_use - entry.pages_cached;
  at("batch").textContent = batch(latest);
  at("batch-of").textContent = `of at most ${about?.max_batch ?? "–"}`;
  at("waiting").textContent = latest.waiting;
  at("pages").textContent = used(latest);
  at("pages-of").textContent = `of ${latest.pages}`;
  const rates = history.map((entry, index) => {
    const before = history[Math.max(0, index - RATE_POLLS)];
    return entry === before ? 0 : ((entry.tokens_total - before.tokens_total) * 1000) / (entry.now - before.now);
  });
  at("rate").textContent = short(rates.at(-1));
  area("batch-chart", history.map(batch), about?.max_batch ?? 1);
  area("waiting-chart", history.map((entry) => entry.waiting), 4);
  area("rate-chart", rates, 10);
  area("pages-chart", history.map(used), latest.pages);
  at("pool-used").style.width = `${(100 * used(latest)) / latest.pages}%`;
  at("pool-cached").style.width = `${(100 * latest.pages_cached) / latest.pages}%`;
  at("pool-used-text").textContent = used(latest);
  at("pool-cached-text").textContent = latest.pages_cached;
  at("pool-free-text").textContent = latest.pages - latest.pages_in_use;
  at("pool").title = `${latest.pages} pages of ${about?.page_size ?? "–"} tokens`;
  latencies("first", firsts);
  latencies("between", betweens);
  dots("between-chart", betweens.slice(-SHOWN_SAMPLES));
}

function latencies(what, samples) {
  at(`${what}-p50`).textContent = samples.length ? time(percentile(samples, 0.5)) : "–";
  at(`${what}-p95`).textContent = samples.length ? time(percentile(samples, 0.95)) : "–";
  at(`${what}-count`).textContent = samples.length;
}

function percentile(samples, share) {
  const sorted = [...samples].sort((a, b) => a - b);
  return sorted[Math.min(sorted.length - 1, Math.ceil(share * sorted.length) - 1)];
}

function keep(samples, value) {
  samples.push(value);
  if (samples.length > KEPT_SAMPLES) samples.shift();
}

function short(value) {
  return value >= 100 ? Math.round(value).toLocaleString("en") : value >= 10 ? value.toFixed(0) : value ? value.toFixed(1) : "0";
}

function time(ms) {
  return ms >= 1000 ? `${(ms / 1000).toFixed(2)} s` : ms >= 10 ? `${ms.toFixed(0)} ms` : `${ms.toFixed(1)} ms`;
}

// Charts

function make(tag, className = "", text = "") {
  const element = document.createElement(tag);
  element.className = className;
  element.textContent = text;
  return element;
}

function shape(tag, attributes) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  return element;
}

function area(id, values, least) {
  const top = Math.max(least, ...values) * 1.08;
  const points = values.map((value, index) => `${HISTORY - values.length + index},${(98 - (96 * value) / top).toFixed(2)}`);
  const svg = at(id);
  svg.setAttribute("viewBox", `0 0 ${HISTORY - 1} 100`);
  svg.setAttribute("preserveAspectRatio", "none");
  const from = HISTORY - values.length;
  svg.replaceChildren(
    shape("path", { class: "area", d: `M${from},100 L${points.join(" L")} L${HISTORY - 1},100 Z` }),
    shape("polyline", { class: "line", points: points.join(" ") }),
  );
}

function dots(id, values) {
  const svg = at(id);
  const { width, height } = svg.getBoundingClientRect();
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  const top = Math.max(1, percentile(values.length ? values : [1], 0.98) * 1.25);
  const y = (value) => Math.max(3, height - 3 - ((height - 6) * value) / top);
  const drawn = values.map((value, index) =>
    shape("circle", { class: "dot", r: 1.8, cx: (4 + ((width - 8) * (SHOWN_SAMPLES - values.length + index)) / (SHOWN_SAMPLES - 1)).toFixed(1), cy: y(value).toFixed(1) }),
  );
  if (values.length) {
    for (const [share, name] of [[0.5, "p50"], [0.95, "p95"]]) {
      const value = percentile(values, share);
      drawn.push(shape("line", { class: "rule", x1: 0, x2: width, y1: y(value), y2: y(value) }));
      const below = name === "p50" && y(value) < height - 14; // so that the two do not meet
      const label = shape("text", { x: 2, y: below ? y(value) + 12 : Math.max(11, y(value) - 4) });
      label.textContent = `${name} ${time(value)}`;
      drawn.push(label);
    }
    at("between-caption").textContent = `time between the latest ${values.length} tokens, from 0 to ${time(top)}`;
  }
  svg.replaceChildren(...drawn);
}

at("form").addEventListener("submit", start);
at("stop").addEventListener("click", () => running.forEach((stream) => stream.stop()));
at("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) at("form").requestSubmit();
});
buttons();
begin().catch((error) => show("form-error", error.message));
poll();
